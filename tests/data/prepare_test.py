"""From GLB files to a dataset: what is kept, what is said about the rest, nothing half-written."""

import json
import shutil

import numpy as np
import pytest
from helpers import glb

from fourdstar_jax import geometry
from fourdstar_jax.data import pipeline, posing, prepare, splits

TINY = dict(
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


def test_the_box_of_the_whole_clip_is_centred():
    from fourdstar_jax.data import gltf

    asset = gltf.load(glb.moving_box(3.0, 2.0))
    sequence = posing.sample_clip(asset, asset.clips[0], fps=8, max_frames=99)
    assert len(sequence.positions) == 16  # the end itself is left out
    # box of side 1 that goes from 0 to 3: x spans 4 units of the file, 0.9 of ours
    np.testing.assert_allclose(sequence.positions[0, :, 0].min(), -0.45, atol=1e-6)
    assert sequence.positions[..., 0].max() < 0.45
    np.testing.assert_allclose(np.ptp(sequence.positions[3], axis=0), 0.225, atol=1e-6)
    np.testing.assert_allclose(sequence.motion, 0.225 * 3 * 15 / 16, atol=1e-5)


def test_the_same_files_give_the_same_hash_and_options_change_it(objects_dir, tmp_path):
    make = prepare.prepare
    first = make(objects_dir, tmp_path / "a", **TINY)
    again = make(objects_dir, tmp_path / "b", **TINY)
    other = make(objects_dir, tmp_path / "c", **TINY | {"fps": 4.0})
    assert first == again and first["sha256"] != other["sha256"]
    assert first["split_sha256"] == splits.SHA256 and first["splits"] == {"train": 3}
    captions = ["a plate, jump high", "a plate, turn", "a red box, slide right"]
    assert first["train_captions"] == captions
    assert names(tmp_path) == ["a", "b", "c"]
    assert not (tmp_path / "a" / "spool").exists()


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


@pytest.mark.parametrize(
    "change, named",
    [({"image_size": 0}, "image_size=0"), ({"views": 99}, "99"), ({"extra_views": -1}, "-1")],
)
def test_settings_out_of_range_are_named(objects_dir, tmp_path, change, named):
    with pytest.raises(ValueError, match=named):
        prepare.prepare(objects_dir, tmp_path / "out", **TINY | change)


@pytest.mark.slow
def test_worker_processes_give_the_same_records(objects_dir, tmp_path):
    one = prepare.prepare(objects_dir, tmp_path / "a", **TINY)
    two = prepare.prepare(objects_dir, tmp_path / "b", **TINY | {"workers": 2})
    assert one["clips"] == two["clips"] and one["sha256"] == two["sha256"]
