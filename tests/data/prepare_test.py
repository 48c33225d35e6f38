"""From GLB files to a dataset: what is kept, what is said about the rest, nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import glb

from fourdstar_jax import geometry
from fourdstar_jax.data import pipeline, prepare, sheet, splits

TINY: dict[str, Any] = dict(
    image_size=9, views=2, extra_views=0, max_frames=3, workers=0, log=lambda line: None, flow=False
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_report_names_what_was_left_out_and_why(dataset_dir):
    report = json.loads((dataset_dir / "report.json").read_text())
    refused = {q["file"]: q["reason"] for q in report["quarantined"]}
    assert set(refused) == {"cut.glb", "text.glb"}
    assert "cut short" in refused["cut.glb"] and "not a GLB" in refused["text.glb"]
    (dropped,) = report["dropped"]
    assert dropped["file"] == "still.glb" and "hardly moves" in dropped["reason"]
    assert (report["assets"], report["clips_kept"]) == (5, 3)
    assert report["images"] == (5 + 4 + 5) * (3 + 2)


def test_records_hold_the_schema(dataset_dir):
    source = pipeline.ClipSource(dataset_dir, "train")
    clips = {clip["clip_id"]: clip for clip in (source[i] for i in range(len(source)))}
    assert sorted(clips) == [f"pack/wild_pack__{x}" for x in ("Plate2#0", "Plate2#1", "RedBox#0")]
    jump = clips["pack/wild_pack__Plate2#0"]
    assert (jump["appearance"], jump["motion"]) == ("a plate", "jump high")
    assert (jump["licence"], jump["split"], jump["fps"]) == ("CC-BY-4.0, too", "train", 8.0)
    assert sorted(clip["index"] for clip in clips.values()) == [0, 1, 2]
    np.testing.assert_allclose(jump["frame_times"], np.arange(4) / 8)  # half a second: 4 frames
    shapes = {k: v.shape for k, v in jump.items() if isinstance(v, np.ndarray)}
    assert shapes == {
        "rig_rgba": (4, 3, 17, 17, 4),
        "rig_viewmats": (3, 4, 4),
        "rig_Ks": (3, 3, 3),
        "rig_flow": (4, 3, 17, 17, 2),
        "rig_depth": (4, 3, 17, 17),
        "extra_rgba": (4, 2, 17, 17, 4),
        "extra_viewmats": (2, 4, 4),
        "extra_Ks": (2, 3, 3),
        "frame_times": (4,),
    }
    assert jump["rig_flow"].dtype == jump["rig_depth"].dtype == np.float16
    rig = geometry.orbit_cameras([0, 120, 240], width=17, height=17)
    np.testing.assert_allclose(jump["rig_viewmats"], rig.viewmats, atol=1e-6)
    np.testing.assert_allclose(jump["rig_Ks"], rig.Ks, atol=1e-5)
    position = np.linalg.inv(jump["extra_viewmats"])[:, :3, 3]
    np.testing.assert_allclose(np.linalg.norm(position, axis=-1), 1.5, atol=1e-5)
    height = position[:, 1] / 1.5  # elevations from -30 (above) to 5 degrees (below)
    assert (height <= np.sin(np.deg2rad(30)) + 1e-6).all()
    assert (height >= -np.sin(np.deg2rad(5)) - 1e-6).all()


def test_images_depth_and_flow_belong_together(dataset_dir):
    """The box slides right: seen from the front its flow is even and equals its picture's way."""
    source = pipeline.ClipSource(dataset_dir, "train")
    clip = next(c for c in (source[i] for i in range(3)) if c["object_id"].endswith("RedBox"))
    x = np.arange(17) + 0.5
    mask = clip["rig_rgba"][:, 0, ..., 3] / 255.0
    center = (mask.sum(1) * x).sum(1) / mask.sum((1, 2))
    flow = clip["rig_flow"][:, 0].astype(np.float32)
    inside = clip["rig_depth"][:, 0] > 0
    for t in range(5):
        step = center[(t + 1) % 5] - center[t]  # of the last frame: back to frame 0
        mean = flow[t][inside[t]].mean(0)
        assert np.sign(mean[0]) == np.sign(step) and abs(mean[0] - step) < 0.35 * abs(step)
        np.testing.assert_allclose(mean[1], 0, atol=0.02)
    assert clip["rig_rgba"][0, 0, 8, :, 0].max() > 100  # red, and only red
    assert clip["rig_rgba"][..., 1:3].max() == 0


def test_the_same_files_give_the_same_hash_and_options_change_it(objects_dir, tmp_path):
    make = prepare.prepare
    first = make(objects_dir, tmp_path / "a", **TINY)
    again = make(objects_dir, tmp_path / "b", **TINY)
    other = make(objects_dir, tmp_path / "c", **TINY | {"fps": 4.0})
    assert first == again and first["sha256"] != other["sha256"]
    assert first["recipe_sha256"] != other["recipe_sha256"]
    assert first["split_sha256"] == splits.SHA256 and first["splits"] == {"train": 3}
    captions = ["a plate, jump high", "a plate, turn", "a red box, slide right"]
    assert first["train_captions"] == captions
    assert names(tmp_path) == ["a", "b", "c"]
    assert not (tmp_path / "a" / "spool").exists()


def test_captions_come_from_tables_and_need_no_new_pictures(objects_dir, tmp_path, monkeypatch):
    options = TINY | {"work_dir": tmp_path / "work"}
    plain = prepare.prepare(objects_dir, tmp_path / "a", **options)
    monkeypatch.setattr(prepare.rendering.Renderer, "draw", None)
    rows = "wild_pack__Plate2,A blue plate.\npack/wild_pack__Plate2#1,spinning\nnobody,else\n"
    (tmp_path / "table.csv").write_text(rows)
    said = []
    options |= {"captions_from": [tmp_path / "table.csv"], "log": said.append}
    told = prepare.prepare(objects_dir, tmp_path / "b", **options)
    assert told["train_captions"] == [
        "A blue plate, jump high",
        "A blue plate, spinning",
        "a red box, slide right",
    ]
    assert plain["clips"] == told["clips"] and plain["sha256"] != told["sha256"]
    assert plain["recipe_sha256"] == told["recipe_sha256"]
    assert said[-1] == "captions: 1 of 2 objects, 1 of 3 motions"
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    assert report["captions"]["objects"] == {"found": 1, "without": ["pack/wild_pack__RedBox"]}
    clips = pipeline.Records(tmp_path / "b", "train", only=("clip_id", "appearance", "motion"))
    found = {c["clip_id"].decode(): c for c in (clips[i] for i in range(len(clips)))}
    plate = found["pack/wild_pack__Plate2#1"]
    assert (plate["appearance"], plate["motion"]) == (b"A blue plate", b"spinning")
    (tmp_path / "table.csv").write_text("nobody,else\n")
    with pytest.raises(ValueError, match="no row is of these 3 clips, as of 'wild_pack__Plate2'"):
        prepare.prepare(objects_dir, tmp_path / "c", **options)


def test_licence_and_limit_choose_assets(objects_dir, tmp_path):
    make = prepare.prepare
    kept = make(objects_dir, tmp_path / "a", **TINY, licence="cc0")
    assert [c["clip_id"] for c in kept["clips"]] == ["pack/wild_pack__RedBox#0"]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["assets_without_the_licence"] == 3
    kept = make(objects_dir, tmp_path / "b", **TINY, limit=2)  # cut.glb, Plate2
    assert [c["clip_id"] for c in kept["clips"]] == [f"pack/wild_pack__Plate2#{i}" for i in (0, 1)]
    with pytest.raises(
        ValueError, match=r"has the licence 'MIT': there are unknown \(2\), CC0-1.0"
    ):
        make(objects_dir, tmp_path / "c", **TINY, licence="MIT")


def test_a_folder_with_something_in_it_is_left_alone(objects_dir, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not empty"):
        prepare.prepare(objects_dir, out, **TINY)
    with pytest.raises(ValueError, match="not overwritten"):
        prepare.prepare(objects_dir, out, **TINY, overwrite=True)
    assert names(out) == ["mine.txt"]
    (out / "mine.txt").unlink()
    prepare.prepare(objects_dir, out, **TINY)
    (out / "spare").touch()
    prepare.prepare(objects_dir, out, **TINY, overwrite=True)  # a dataset of ours is replaced
    assert "spare" not in names(out) and "manifest.json" in names(out)
    assert names(tmp_path) == ["out"]


def test_failure_leaves_nothing_behind(objects_dir, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in ("cut.glb", "text.glb"):
        shutil.copy(objects_dir / name, bad)
    with pytest.raises(
        ValueError, match="no clip left of 2 files .*cut.glb: cut short.*text.glb: not a GLB"
    ):
        prepare.prepare(bad, tmp_path / "out", **TINY)
    assert names(tmp_path) == ["bad"]

    def interrupted(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(objects_dir, tmp_path / "out", **TINY | {"log": interrupted})
    assert names(tmp_path) == ["bad"]


def masks(folder, split="train"):
    """Share of the picture that is covered, of each record: the mean over frames and views."""
    source = pipeline.ClipSource(folder, split)
    clips = [source[i] for i in range(len(source))]
    return {c["clip_id"]: (c["rig_rgba"][..., 3] / 255).mean() for c in clips}


def test_clips_of_training_have_a_zoom_and_rigs_of_their_own(objects_dir, tmp_path):
    options = TINY | {"image_size": 32, "views": 4, "zoom": (1.0, 1.0)}
    prepare.prepare(objects_dir, tmp_path / "one", **options)
    prepare.prepare(objects_dir, tmp_path / "low", **options | {"zoom": (0.6, 0.6)})
    prepare.prepare(objects_dir, tmp_path / "rigs", **options | {"zoom": (0.6, 1.1), "rigs": 5})
    one, low, rigs = (masks(tmp_path / name) for name in ("one", "low", "rigs"))
    for clip_id, area in one.items():
        np.testing.assert_allclose(low[clip_id] / area, 0.36, rtol=0.2)  # nearer than in 1.5 units
        seen = [rigs[clip_id], *(rigs[f"{clip_id}@{r}"] for r in range(1, 5))]
        assert len({round(float(x), 5) for x in seen}) == 5
        assert 0.2 < min(seen) / area and max(seen) / area < 4  # a plate from its sides
    assert len(rigs) == 5 * len(one)
    words = pipeline.load_words(tmp_path / "rigs", 7)
    batch = next(
        iter(
            pipeline.make_loader(tmp_path / "rigs", "train", batch_size=8, timesteps=2, words=words)
        )
    )
    assert len(batch["clip"]) == 8


def test_clips_of_training_lie_off_the_middle_and_are_whole(objects_dir, tmp_path):
    options = TINY | {"image_size": 64, "views": 4, "zoom": (1.0, 1.0)}

    def boxes(name, shift):  # per view: the first and last row and column of the object [V, 4]
        prepare.prepare(objects_dir, tmp_path / name, **options | {"shift": shift})
        source = pipeline.ClipSource(tmp_path / name, "train")
        for clip in (source[i] for i in range(len(source))):
            seen = clip["rig_rgba"][..., 3].max(axis=0) > 0
            lines = [seen.any(axis=axis) for axis in (2, 1)]
            ends = [(x.argmax(axis=1), 63 - x[:, ::-1].argmax(axis=1)) for x in lines]
            yield clip["clip_id"], np.stack([*ends[0], *ends[1]], axis=1)

    middle, moved = dict(boxes("middle", 0.0)), dict(boxes("moved", 0.2))
    for clip, box in moved.items():
        assert box.min() > 0 and box.max() < 63
        off = (box - middle[clip]).reshape(-1, 2, 2).mean(axis=2)  # of the box's middle, in pixels
        assert np.abs(off).max() > 1
        np.testing.assert_allclose(off[:, 0], off[:1, 0].repeat(4), atol=2)  # up is up to all views
        np.testing.assert_allclose(off[0, 1], -off[2, 1], atol=2)  # left is right from behind


def test_unseen_clips_have_no_zoom_and_what_is_left_out_is_named(
    objects_dir, tmp_path, monkeypatch
):
    import hashlib

    def sha(name):
        return hashlib.sha256((objects_dir / name).read_bytes()).hexdigest()

    plate, box = sha("pack/wild_pack__Plate2.glb"), sha("pack/wild_pack__RedBox.glb")
    table = {(plate, 0): "left_out", (plate, 1): "train", (box, 0): "unseen_object"}
    monkeypatch.setattr(splits, "load", lambda: table)
    monkeypatch.setattr(splits, "reason_of", lambda sha, index: "by the test")
    for name, zoom in (("a", (1.0, 1.0)), ("b", (0.6, 0.6))):
        prepare.prepare(objects_dir, tmp_path / name, **TINY | {"zoom": zoom, "rigs": 2})
    assert masks(tmp_path / "a", "unseen_object") == masks(tmp_path / "b", "unseen_object")
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    reasons = {(d["file"], d["clip"]): d["reason"] for d in report["dropped"]}
    dropped = reasons["pack/wild_pack__Plate2.glb", "Armature|Jump_High"]
    assert dropped == "left out of the split v2: by the test"
    assert report["counts"]["unseen_object"]["clips"] == 1
    assert report["counts"]["train"]["clips"] == 2 and report["counts"]["train"]["objects"] == 1


def test_a_benchmark_is_the_unseen_clips_alone_and_has_one_recipe_everywhere(
    objects_dir, tmp_path, monkeypatch
):
    import hashlib

    def sha(name):
        return hashlib.sha256((objects_dir / name).read_bytes()).hexdigest()

    plate, box = sha("pack/wild_pack__Plate2.glb"), sha("pack/wild_pack__RedBox.glb")
    table = {(plate, 0): "train", (plate, 1): "unseen_clip", (box, 0): "unseen_object"}
    monkeypatch.setattr(splits, "load", lambda: table)
    whole = prepare.prepare(objects_dir, tmp_path / "whole", **TINY)
    both = ("unseen_clip", "unseen_object")
    made = prepare.prepare(objects_dir, tmp_path / "a", **TINY, splits=both)
    clips = {c["clip_id"]: c for c in whole["clips"]}
    assert made["splits"] == {"unseen_clip": 1, "unseen_object": 1}
    assert all(clips[c["clip_id"]] == c for c in made["clips"])  # and nothing of them changes
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    assert report["assets"] == 2 and not report["dropped"] and not report["quarantined"]
    draw = prepare.rendering.Renderer.draw

    def brighter(self, *args, **kwargs):  # as another machine's renderer may be, by one level
        frame = draw(self, *args, **kwargs)
        return frame._replace(rgba=np.where(frame.rgba == 0, np.uint8(1), frame.rgba))

    monkeypatch.setattr(prepare.rendering.Renderer, "draw", brighter)
    elsewhere = prepare.prepare(objects_dir, tmp_path / "b", **TINY, splits=both)
    assert elsewhere["sha256"] != made["sha256"]
    assert elsewhere["recipe_sha256"] == made["recipe_sha256"] != whole["recipe_sha256"]
    with pytest.raises(ValueError, match="no file below .* has a clip of unseen_object$"):
        prepare.prepare(
            objects_dir, tmp_path / "c", **TINY, splits=("unseen_object",), licence="unknown"
        )


def test_clips_that_are_hardly_seen_are_dropped_and_counts_told(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "box.glb").write_bytes(glb.moving_box(0.4))
    w = glb.box_writer(size=(0.1, 0.1, 0.1))  # a speck that leaps to and fro, and up a bit
    ways = [[0, 0, 0], [0.9, 0.04, 0], [0, 0, 0]]
    w.animate("leap", (0, "translation", [0, 0.5, 1], ways))
    w.tree["nodes"] = [
        {"name": "root", "children": [1, 2]},
        {"name": "speck", "mesh": 0},
        {"name": "far", "mesh": 0, "translation": [40, 0, 0]},
    ]
    w.tree["animations"][0]["channels"][0]["target"]["node"] = 1
    (folder / "specks.glb").write_bytes(w.bytes())
    prepare.prepare(folder, tmp_path / "out", **TINY | {"image_size": 32, "max_frames": 8})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (dropped,) = report["dropped"]
    assert (
        dropped["file"] == "specks.glb"
        and "of each picture of a frame, less than 1%" in dropped["reason"]
    )
    counts = report["counts"]["train"]
    assert (counts["clips"], counts["objects"]) == (1, 1)
    assert (counts["coloured"], counts["textured"]) == (0, 0)
    assert 0.05 < counts["mask_area_quartiles"][1] < 0.5


def test_sheet_shows_every_object_once(dataset_dir, tmp_path):
    from PIL import Image

    assert sheet.write(dataset_dir, tmp_path / "sheet.png") == 2
    picture = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert picture.shape == (sheet.CELL + sheet.LABEL, 4 * sheet.CELL, 3)
    red = (picture[..., 0] > 100) & (picture[..., 1:].max(-1) < 60)
    assert red[:, 2 * sheet.CELL :].sum() > 100  # the red box is the second by name
    with pytest.raises(ValueError, match="sheet.tga must end in .png"):
        sheet.write(dataset_dir, tmp_path / "sheet.tga")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"image_size": 0}, "image_size=0"),
        ({"views": 99}, "99"),
        ({"extra_views": -1}, "-1"),
        ({"zoom": (1.1, 0.6)}, "zoom="),
        ({"shift": 0.3}, "shift="),
        ({"rigs": 65}, "rigs=65"),
    ],
)
def test_settings_out_of_range_are_named(objects_dir, tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        prepare.prepare(objects_dir, tmp_path / "out", **TINY | change)


def test_many_records_go_to_many_files(objects_dir, tmp_path, monkeypatch):
    """As if each were as large as a file may be: the same records in the same order."""
    from fourdstar_jax.data import builder

    monkeypatch.setattr(builder, "FILE_BYTES", 1)
    monkeypatch.setattr(builder.os, "cpu_count", lambda: 1)  # three are begun at once
    prepare.prepare(objects_dir, tmp_path / "data", **TINY)
    kept = pipeline.Records(tmp_path / "data", "train")
    assert len(list((tmp_path / "data").glob("*-train.array_record-*-of-00003"))) == len(kept) == 3
    monkeypatch.undo()
    prepare.prepare(objects_dir, tmp_path / "one", **TINY)
    one = pipeline.Records(tmp_path / "one", "train")
    assert [kept[i]["clip_id"] for i in range(3)] == [one[i]["clip_id"] for i in range(3)]


def test_worker_processes_give_the_same_records(objects_dir, tmp_path):
    one = prepare.prepare(objects_dir, tmp_path / "a", **TINY)
    two = prepare.prepare(objects_dir, tmp_path / "b", **TINY | {"workers": 2})
    assert one["clips"] == two["clips"] and one["sha256"] == two["sha256"]


def test_flat_objects_are_no_specks(tmp_path):
    """The quads of the cases are edge-on in two of the four views."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "cases" / "glb"
    if not folder.is_dir():
        pytest.skip("the cases are not here")
    prepare.prepare(folder, tmp_path / "out", **TINY)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["clips_kept"] == report["assets"] == 20
    assert not report["dropped"] and not report["quarantined"]
