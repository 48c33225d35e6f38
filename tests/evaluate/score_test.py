"""Scoring: what is read and matched, refused, averaged and compared."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import cli, outside
from fourdstar_jax.data import pipeline, prepare, untrusted, video
from fourdstar_jax.data.decode import MIN_SIDE
from fourdstar_jax.evaluate import clips, measured, protocols, report, score, self_check
from fourdstar_jax.evaluate.networks import Networks, Rehearsal
from fourdstar_jax.evaluate.resizing import resized
from fourdstar_jax.export import read_splats, write_splats
from fourdstar_jax.geometry import Rig
from fourdstar_jax.perceptual import clip as perceptual_clip
from fourdstar_jax.types import Gaussians

OPEN = protocols.find("fourdstar-open-v2")
PLAIN = ("psnr", "ssim")
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Pictures are decoded here: a process for each folder is what `data/video_test.py` tests."""

    class Refused(BaseException):
        """Not an Exception, as little as the end of a process is one."""

    def refuse(message):
        raise Refused(message)

    def decode(path, **request):
        try:
            return untrusted.read(path, request | {"min_side": MIN_SIDE})
        except Refused as refused:
            raise ValueError(str(refused)) from None

    monkeypatch.setattr(untrusted, "refuse", refuse)
    monkeypatch.setattr(video, "decode", decode)


def write(folder, frames):
    folder.mkdir(parents=True)
    for t, frame in enumerate(frames):
        Image.fromarray(np.asarray(frame, np.uint8)).save(folder / f"{t}.png")


@pytest.fixture
def folders(tmp_path):
    """Three objects of two views and three frames; predictions are off by 3, 6 and 9 levels."""
    for number in range(3):
        for view in "ab":
            truth = RNG.integers(0, 200, (3, 16, 18, 3))
            write(tmp_path / "gt" / f"o{number}" / view, truth)
            write(tmp_path / "pred" / f"o{number}" / view, truth + 3 * (number + 1))
    return tmp_path


def given(monkeypatch):
    """Weights of all networks, which a test has its own in place of."""
    for name in ("check", "get"):
        monkeypatch.setattr(Networks, name, lambda self, name: None)


def scored(folder, protocol=OPEN, metrics=PLAIN, pred="pred", gt="gt", **kw):
    sources = (
        clips.open_source(folder / side, protocol, read_splats=read_splats, **kw)
        for side in (pred, gt)
    )
    return score.score(protocol, *sources, Networks(None, batch=5), metrics=metrics)


def test_rows_summary_and_tables(folders):
    result = scored(folders)
    known = [20 * np.log10(255 / (3 * n)) for n in (1, 2, 3)]
    found = [row["metrics"]["psnr"] for row in result["objects"]]
    np.testing.assert_allclose(found, known, rtol=1e-6)
    figure = result["summary"]["psnr"]
    assert figure["value"] == pytest.approx(np.mean(known))
    assert figure["interval_95"] == pytest.approx([min(known), max(known)])  # 1 of 27 draws each
    assert (result["num_objects"], result["num_clips"]) == (3, 6)
    assert result["objects"][1]["frames"] == 3 and result["objects"][1]["size"] == [18, 16]
    assert result["protocol"]["left_out"]["fvd"] == "not chosen"
    table = report.markdown(result)
    assert f"| o1 | {known[1]:.2f} |" in table and "version 3" in table
    assert rf"{np.mean(known):.2f} {{\scriptsize [" in report.latex(result)
    json.dumps(result, allow_nan=False)


def test_two_results_are_compared_object_by_object(folders):
    once = scored(folders)
    (folders / "once.json").write_text(json.dumps(once))
    other = outside.read(folders / "once.json")
    for view in "ab":
        for t in range(3):
            path = folders / "pred" / "o1" / view / f"{t}.png"
            path.write_bytes((folders / "gt" / "o1" / view / f"{t}.png").read_bytes())
    found = report.compare(scored(folders), other)["metrics"]["psnr"]
    gain = protocols.SAME_PSNR - once["objects"][1]["metrics"]["psnr"]
    assert found["difference"] == pytest.approx(gain / 3) and found["better"] == pytest.approx(
        1 / 3
    )
    assert found["interval_95"] == pytest.approx([0, gain])
    Image.new("RGB", (18, 16)).save(folders / "gt/o2/a/1.png")
    with pytest.raises(
        ValueError, match=f"truths are others, of hash {once['truths']['frames_sha256']}, not"
    ):
        report.compare(scored(folders), other)
    result = scored(folders)
    for truths in (once["truths"], result["truths"]):
        truths |= {"recipe_sha256": "a" * 64, "split": "unseen_object", "min_frames": 1}
    found = report.compare(result, outside.Fields(once, "x.json"))
    assert "by the same recipe" in found["note"] and found["metrics"]
    result["truths"]["min_frames"] = 2
    with pytest.raises(ValueError, match="truths are others"):
        report.compare(result, outside.Fields(once, "x.json"))
    once["protocol"]["version"] = 1
    with pytest.raises(ValueError, match="version 1, not by .* version 3: .* do not compare"):
        report.compare(scored(folders), outside.Fields(once, "x.json"))
    with pytest.raises(ValueError, match="object o2 is in one of the two"):
        report.compare(once, outside.Fields(once | {"objects": once["objects"][:2]}, "x.json"))


def test_an_optional_network_is_left_out_where_it_is_not_there(folders, tmp_path):
    some = dataclasses.replace(OPEN, metrics=(OPEN.metric("psnr"), OPEN.metric("dreamsim")))
    found = scored(folders, some, metrics=())
    assert set(found["summary"]) == {"psnr"}
    assert "is needed for DreamSim" in found["protocol"]["left_out"]["dreamsim"]
    with pytest.raises(ValueError, match="is needed for DreamSim"):
        scored(folders, some, metrics=("dreamsim",))


def test_what_networks_make_of_truths_serves_other_predictions(folders, monkeypatch):
    asked = []

    def features(self, name, images):
        asked.append(len(images))
        return images.mean(axis=(1, 2))

    given(monkeypatch)
    monkeypatch.setattr(Networks, "features", features)
    known, found = {}, []
    for side in ("pred", "gt"):
        sources = (
            clips.open_source(folders / s, OPEN, read_splats=read_splats) for s in (side, "gt")
        )
        result = score.score(
            OPEN, *sources, Networks(None), metrics=("dreamsim", "fid"), known=known
        )
        found.append(result["summary"]["fid"]["value"])
    assert len(asked) == 2 * (6 + 6 + 6)  # two networks: both sides of six clips, then one
    assert found[0] > 1 and abs(found[1]) < 1e-6


def test_the_estimate_comes_before_the_first_clip(folders, monkeypatch):
    """By what a clip takes; what is measured is the same with and without."""
    sources = [
        clips.open_source(folders / s, OPEN, read_splats=read_splats) for s in ("pred", "gt")
    ]
    lines, seen = [], []

    def psnr(clip, metric, networks):
        seen.append((len(lines), isinstance(networks, Rehearsal)))
        return known(clip, metric, networks)

    known = measured.VALUES["psnr"]
    monkeypatch.setitem(measured.VALUES, "psnr", psnr)
    plain = score.score(OPEN, *sources, Networks(None), metrics=PLAIN)
    assert seen == [(0, False)] * 6
    seen.clear()
    result = score.score(OPEN, *sources, Networks(None), metrics=PLAIN, log=lines.append)
    assert seen[:3] == [(1, True), (1, True), (2, False)] and len(seen) == 8
    assert lines[1].startswith("about 0.") and lines[1].endswith(" minutes for all")
    assert {**result, "seconds": 0} == {**plain, "seconds": 0}
    monkeypatch.setattr(score, "_seconds", lambda metrics, clip, networks: 3000.0)
    score.score(OPEN, *sources, Networks(None), metrics=("psnr", "jitter"), log=lines.append)
    assert "about 300.0 minutes for all, without jitter" in lines


def test_how_long_a_clip_takes(folders, monkeypatch):
    """Each program runs twice, and counts for each batch; what truths give is not asked for."""
    now, ran = [0.0], []

    def call(self, function, name, *arrays, **options):
        now[0] += 2 if (name, arrays[0].shape) in ran else 50  # it compiles
        ran.append((name, arrays[0].shape))
        return np.asarray(arrays[0]).mean(axis=(1, 2))

    given(monkeypatch)
    monkeypatch.setattr(Networks, "_call", call)
    monkeypatch.setattr(score.time, "perf_counter", lambda: now[0])
    sources = (
        clips.open_source(folders / s, OPEN, read_splats=read_splats) for s in ("pred", "gt")
    )
    pair = clips.pairs(*sources, OPEN)[0]
    metrics = [OPEN.metric(name) for name in ("dreamsim", "fid", "fid_vid")]
    clip = score._read(OPEN, tuple(m.resize for m in metrics), {}, pair)
    networks = Networks(None, batch=2)
    # three frames are two batches, of two sides, for two networks: what FID has, FID-VID has too
    assert score._seconds(metrics, clip, networks) == 2 * (2 * 2 * 2)
    assert ran == [("dreamsim", (2, 224, 224, 3))] * 2 + [("inception", (2, 299, 299, 3))] * 2
    assert not clip.known and not clip.features
    for metric in metrics:
        measured.SETS.get(metric.name, measured._features)(clip, metric, networks)
    clip.features.clear()
    assert len(clip.known) == 2 and score._seconds(metrics, clip, networks) == 2 * (2 * 2)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def not_finite(path):
    with np.load(path) as stored:
        np.savez(path, **{**stored, "proj": np.full_like(stored["proj"], np.nan)})


def of_another_network(path):
    np.savez(path, **{"fc.weight": np.zeros((3, 3), np.float32)})


@pytest.mark.parametrize(
    "damage, told",
    [
        (cut, "no .npz of arrays"),
        (not_finite, "proj holds float32 that are not all finite"),
        (of_another_network, "not the weights of CLIP ViT-B/32: class_embedding is missing"),
    ],
)
def test_damaged_weights_are_found_before_a_clip_is_read(folders, monkeypatch, damage, told):
    sizes = perceptual_clip.Sizes(patch=112, width=64, layers=1, dim=8)
    monkeypatch.setitem(perceptual_clip.NETWORKS, "ViT-B/32", sizes)
    arrays = {
        name: RNG.normal(size=shape).astype(np.float32) / 8
        for name, shape in perceptual_clip.shapes(sizes).items()
    }
    path = folders / "clip_b32.npz"
    np.savez(path, **arrays)
    sources = [
        clips.open_source(folders / s, OPEN, read_splats=read_splats) for s in ("pred", "gt")
    ]

    def run():
        return score.score(OPEN, *sources, Networks(folders), metrics=("psnr", "clip_b32"))

    assert 0 < run()["summary"]["clip_b32"]["value"] < 1
    damage(path)
    monkeypatch.setattr(clips, "load", lambda pair, protocol: pytest.fail("a clip was read"))
    with pytest.raises(ValueError, match=f"clip_b32.npz: {told}"):
        run()


def test_dreamsim_is_one_less_the_cosine(folders, monkeypatch):
    def features(self, name, images):
        assert name == "dreamsim" and images.shape[1:3] == (224, 224)
        red = np.arange(len(images)) < 2  # of a clip of three
        return np.where(red[:, None], [3.0, 4.0], images.mean(axis=(1, 2))[:, :2])

    given(monkeypatch)
    monkeypatch.setattr(Networks, "features", features)
    for side, colour in (("pred", (0, 9, 0)), ("gt", (9, 0, 0))):
        for view in "ab":
            Image.new("RGB", (18, 16), colour).save(folders / side / "o1" / view / "2.png")
    result = scored(folders, metrics=("dreamsim",))
    row = next(row for row in result["objects"] if row["object"] == "o1")
    np.testing.assert_allclose(row["metrics"]["dreamsim"], 1 / 3, atol=1e-9)  # one frame of three


def test_temporal_error_and_short_clips_by_hand(tmp_path):
    frames = np.zeros((3, 16, 16, 4), np.uint8)
    frames[..., 3] = 255
    truth, made = frames.copy(), frames.copy()
    truth[1:, ..., :3], made[2, ..., :3] = 51, 102  # changes by 51, 0; and by 0, 102
    truth[:, 8:, :, 3] = 0  # only the upper half counts
    made[:, 8:, :, :3] = 7
    write(tmp_path / "gt" / "o" / "0", truth)
    write(tmp_path / "pred" / "o" / "0", made)
    found = scored(tmp_path, metrics=("temporal_error",))
    assert found["summary"]["temporal_error"]["value"] == pytest.approx(0.3, rel=1e-5)
    ten = measured._stretched(np.arange(4)[:, None], 9)[:, 0]
    assert ten.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert len(measured._stretched(np.zeros((16, 1)), 16)) == 16


def test_what_does_not_match_is_named(folders):
    (folders / "pred/o1/b/2.png").unlink()
    with pytest.raises(ValueError, match="object o1, view b: frame 2 is missing in the prediction"):
        scored(folders)
    Image.new("RGB", (17, 16)).save(folders / "pred/o1/b/2.png")
    with pytest.raises(ValueError, match="o1, view b: .*2.png is 17x16 pixels"):
        scored(folders)
    (folders / "pred/o1/b").rename(folders / "pred/o1/c")
    with pytest.raises(ValueError, match="object o1: view b is missing in .*pred"):
        scored(folders)
    (folders / "pred/o1").rename(folders / "o1")
    with pytest.raises(ValueError, match="object o1 of .*gt: not in .*pred"):
        scored(folders)
    with pytest.raises(ValueError, match="object o0: 2 views in .*a, b.*; 4dstar-re.* has 4"):
        scored(folders, protocols.find("4dstar-reconstruction"), (), pred="gt")
    with pytest.raises(ValueError, match="--weights DIR is needed for LPIPS .*VGG"):
        scored(folders, metrics=("lpips_vgg",), pred="gt")
    with pytest.raises(ValueError, match="no metric 'fdv', only psnr, "):
        scored(folders, metrics=("fdv",), pred="gt")


def test_a_number_missing_in_the_middle(folders):
    """On both sides, so that the counts agree."""
    for side in ("pred", "gt"):
        Image.new("RGB", (18, 16)).save(folders / side / "o1" / "b" / "4.png")
    with pytest.raises(ValueError, match="o1, view b: .*b: 3.png is missing between 2.png and 4"):
        scored(folders)


def test_two_pictures_of_one_number(folders):
    """On both sides, so that the counts agree."""
    for side in ("pred", "gt"):
        Image.new("RGB", (18, 16)).save(folders / side / "o1" / "b" / "1.jpg")
    with pytest.raises(ValueError, match="o1, view b: .*b: 1.jpg and 1.png have the same number"):
        scored(folders)


def test_a_metric_named_twice_counts_once(folders, monkeypatch):
    def logits(self, video, *, pool_frames):
        return video.mean(axis=(0, 1))[:6, 0].astype(np.float32)

    given(monkeypatch)
    monkeypatch.setattr(Networks, "logits", logits)
    once, twice = (scored(folders, metrics=("fvd",) * count) for count in (1, 2))
    assert once["summary"] == twice["summary"] and once["summary"]["fvd"]["rows"] == 6


@pytest.mark.parametrize("metric", ["clip_b32", "fid"])
def test_what_is_not_finite_is_refused(folders, monkeypatch, metric):
    def features(self, name, images):
        return np.zeros((len(images), 4)) / (0 if name == "inception" else 1)

    given(monkeypatch)
    monkeypatch.setattr(Networks, "features", features)
    with np.errstate(invalid="ignore"):
        with pytest.raises(ValueError, match=f"o0, view a: {metric}: what was measured is not f"):
            scored(folders, metrics=(metric,))


def test_sizes_that_differ(tmp_path):
    write(tmp_path / "gt/o/0", np.zeros((2, 16, 16, 3)))
    write(tmp_path / "pred/o/0", np.zeros((2, 32, 32, 3)))
    with pytest.raises(ValueError, match="view 0: the prediction has frames of 32x32 .* 16x16"):
        scored(tmp_path)


def test_transparency_needs_a_background(tmp_path):
    frames = np.full((2, 16, 16, 4), 255)
    frames[1, :8, :8] = [0, 0, 0, 51]
    write(tmp_path / "gt/o/0", frames)
    white = np.full((2, 16, 16, 3), 255)
    white[1, :8, :8] = 204
    write(tmp_path / "pred/o/0", white)
    assert scored(tmp_path)["summary"]["psnr"]["value"] == protocols.SAME_PSNR
    strict = dataclasses.replace(OPEN, background=None)
    with pytest.raises(ValueError, match="view 0: the truth is transparent in frame 1, .*white"):
        scored(tmp_path, strict)
    result = scored(tmp_path, metrics=(*PLAIN, "alpha_iou"))
    assert result["protocol"]["left_out"]["alpha_iou"] == "the prediction has no alpha channel"


def test_one_video_has_no_fvd(tmp_path, released_weights):
    write(tmp_path / "gt/o/0", np.zeros((2, 16, 16, 3)))
    options = dict(read_splats=read_splats)
    protocol = protocols.find("set-fvd")
    source = clips.open_source(tmp_path / "gt", protocol, **options)
    networks = Networks(released_weights("i3d").parent)
    with pytest.raises(ValueError, match="fvd: one video is no set"):
        score.score(protocol, source, source, networks, metrics=("fvd",))


def test_a_data_set_against_objects_made_here(dataset_dir, tmp_path):
    """A large dark Gaussian, and nothing, at the data set's own views."""
    source = clips.open_source(dataset_dir, OPEN, read_splats=read_splats, split="train")
    assert len(source.entries) == 3 and source.azimuths == (0.0, 120.0, 240.0)
    frames = [len(entry.views[0].load(None).images) for entry in source.entries.values()]
    options = dict(read_splats=read_splats, split="train")
    long = clips.open_source(dataset_dir, OPEN, min_frames=max(frames), **options)
    assert len(long.entries) == frames.count(max(frames)) < 3
    with pytest.raises(ValueError, match="no clip of train has 99 frames or more"):
        clips.open_source(dataset_dir, OPEN, min_frames=99, **options)
    rig = Rig.around(5, fps=8.0)  # of the model: not the data set's
    for number, (name, entry) in enumerate(source.entries.items()):
        folder = tmp_path / "pred" / name
        folder.mkdir(parents=True)
        count = len(entry.views[0].load(None).images)
        shape = (count, 1)
        gaussians = Gaussians(
            means=np.zeros((*shape, 3), np.float32),
            quats=np.tile(np.float32([1, 0, 0, 0]), (*shape, 1)),
            scales=np.full((*shape, 3), 0.2, np.float32),
            opacities=np.full(shape, 0.9 if number else 0.0, np.float32),
            colors=np.zeros((*shape, 3), np.float32),
        )
        write_splats(folder / "splats.safetensors", gaussians, fps=8.0)
        manifest = {"timesteps": count, "gaussians": 1, "files": {}, "rig": rig.to_dict()}
        manifest["generation"] = {"seconds": 2.5, "peak_memory_bytes": 2**31}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    names = ("psnr", "psnr_in_mask", "alpha_iou", "ssim", "warping_error", "flow_error", "cd_m")
    pred = clips.open_source(
        tmp_path / "pred", OPEN, read_splats=read_splats, azimuths=source.azimuths
    )
    result = score.score(OPEN, pred, source, Networks(None), metrics=names)
    rows = result["objects"]
    assert [list(row["views"]) for row in rows] == [["azimuth 0", "azimuth 120", "azimuth 240"]] * 3
    assert rows[0]["metrics"]["alpha_iou"] == 0 and rows[0]["metrics"]["warping_error"] < 1e-6
    assert all(row["metrics"]["alpha_iou"] > 0.1 for row in rows[1:])
    flows = [
        np.linalg.norm(view.load(None).flow[:-1].astype(np.float32), axis=-1)[
            view.load(None).alphas[:-1] > 127
        ].mean()
        for view in source.entries[rows[1]["object"]].views
    ]
    # nothing of the prediction moves: it is off by all that the truth moves
    assert (
        rows[1]["metrics"]["flow_error"] == pytest.approx(np.mean(flows), rel=1e-4)
        and min(flows) > 0
    )
    assert result["summary"]["psnr"]["interval_95"] is not None  # two objects, three clips
    assert result["generation"]["seconds"] == {"mean": 2.5, "median": 2.5}
    assert "generation: 2.5 s an object (median 2.5), at most 2.00 GiB" in report.markdown(result)
    assert (
        result["truths"]["sha256"]
        == json.loads((dataset_dir / "manifest.json").read_text())["sha256"]
    )
    assert "prepare --points" in result["protocol"]["left_out"]["cd_m"]
    with pytest.raises(ValueError, match="views at 0, 120, 240 degrees; those at 0, 90, 180, 270"):
        clips.open_source(
            dataset_dir, protocols.find("4dstar-reconstruction"), read_splats=read_splats,
            split="train",
        )  # fmt: skip


def test_tracked_points_against_gaussians(objects_dir, tmp_path):
    """Gaussians at the true points: nothing is amiss, and the hash without points stays."""
    options = dict(image_size=16, views=5, extra_views=0, max_frames=3, workers=0, limit=1)
    prepare.prepare(
        objects_dir / "pack", tmp_path / "set", **options, points=50, depth=True, log=str
    )
    source = clips.open_source(tmp_path / "set", OPEN, read_splats=read_splats, split="train")
    assert pipeline.read_manifest(tmp_path / "set")["settings"]["points"] == 50
    clip = pipeline.ClipSource(tmp_path / "set", "train", points=True)[0]
    lengths = np.linalg.norm(np.asarray(clip["point_normals"], np.float32), axis=-1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)
    assert "points" not in pipeline.ClipSource(tmp_path / "set", "train")[0]
    gaussians = {}
    for name, entry in source.entries.items():
        points = entry.points()
        assert points.shape[1:] == (50, 3) and np.ptp(points, axis=0).max() > 0.01  # it moves
        opacities = np.ones(points.shape[:2], np.float32)
        gaussians[name] = Gaussians(points, None, None, opacities, None)
    entries = {
        name: dataclasses.replace(entry, gaussians=lambda name=name: gaussians[name])
        for name, entry in source.entries.items()
    }
    pred = dataclasses.replace(source, entries=entries)
    names = ("cd_3d", "cd_4d", "cd_m", "f_score", "jitter", "reprojection")
    result = score.score(OPEN, pred, source, Networks(None), metrics=names)
    found = {name: figure["value"] for name, figure in result["summary"].items()}
    bends, reprojection = found.pop("jitter"), found.pop("reprojection")
    tracks = [entry.points() for entry in source.entries.values()]
    wanted = np.mean([np.linalg.norm(p[0] - 2 * p[1] + p[2], axis=-1).mean() for p in tracks])
    assert bends == pytest.approx(wanted, rel=1e-4) and wanted > 0.001
    assert 0 <= reprojection < 0.5  # of two sides of it, lit as they are
    assert found == pytest.approx({"cd_3d": 0, "cd_4d": 0, "cd_m": 0, "f_score": 1}, abs=1e-5)


def test_tensorflows_bilinear_by_hand():
    """Place 4 i / 8 between the pixels; beyond the last one its own value."""
    row = np.array([0, 40, 80, 200], np.uint8)
    frames = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 3)).copy()
    step = protocols.Resize(8, "TensorFlow 1", "bilinear")
    found = resized(frames, (step,))
    np.testing.assert_allclose(found[0, 3, :, 1], [0, 20, 40, 60, 80, 140, 200, 200])


def test_self_check():
    found = list(self_check.cases())
    assert len(found) >= 7 and all(case.right for case in found)
    assert not self_check.Case("", float("nan"), 0, 1).right


def test_the_command(folders, capsys):
    command = ["evaluate", "--protocol", "fourdstar-open-v2", "--metrics", *PLAIN]
    command += ["--pred", str(folders / "pred"), "--gt", str(folders / "gt")]
    out = folders / "out" / "x.json"
    assert cli.main([*command, "--out", str(out)]) == 0
    told = capsys.readouterr()
    about, estimate, left, *_ = told.err.splitlines()
    assert about == "fourdstar-open-v2: 6 clips of 3 objects by psnr, ssim"
    assert estimate.startswith("about ") and estimate.endswith(" minutes for all")
    assert left.startswith("2 of 6 clips, about ") and "minutes to go" in left
    assert "PSNR" in told.out
    assert (out.with_suffix(".md")).read_text() == told.out
    assert cli.main([*command, "--against", str(out)]) == 0
    assert "| PSNR ↑ | +0.00 | [+0.00, +0.00] | 0 % of objects |" in capsys.readouterr().out
    assert cli.main(["evaluate", "--pred", "x", "--data", "y"]) == 2
    assert "--pred needs --protocol" in capsys.readouterr().err
    assert cli.main(["evaluate"]) == 2
    assert "give --protocol" in capsys.readouterr().err


def test_protocols_are_told_whole():
    for protocol in protocols.PROTOCOLS.values():
        text = "\n".join(protocols.described(protocol))
        assert f"version {protocol.version}" in text
        for metric in protocol.metrics:
            assert metric.name in text
    from fourdstar_jax.cli.evaluate import PROTOCOLS

    assert list(PROTOCOLS) == list(protocols.PROTOCOLS)
