"""Renders in L4GM's layout become records; other systems' are named."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax.cli.main import main
from fourdstar_jax.data import l4gm, pipeline, prepare

SIZE, FOCAL = 64, 64 * 35 / 32  # of the script's lens and sensor
OPTIONS: dict[str, Any] = dict(image_size=32, views=4, extra_views=2, max_frames=3, workers=0)
OPTIONS |= dict(flow=False, zoom=(1.0, 1.0), shift=0.0, renders=True)
ELEVATIONS = (20.0, -5.0, 0.0)


def center(frame):
    """Of the ball, in Blender's frame, z up: it rises and goes off to one side."""
    return np.array([0.15 + 0.05 * frame, -0.1, 0.1 + 0.05 * frame])


def seen(point, rotation_deg, elevation_deg):
    """Pixels of a point: Blender's camera at +y, turned about x, then about z with its parent."""
    a, e = np.deg2rad([rotation_deg, elevation_deg])
    about_x = [[1, 0, 0], [0, np.cos(e), -np.sin(e)], [0, np.sin(e), np.cos(e)]]
    about_z = [[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]
    x, y, z = (np.array(about_z) @ about_x).T @ point  # the camera's own: it stands at y = 1.5
    return SIZE / 2 + FOCAL * np.array([-x, -z]) / (1.5 - y)


def write_camera(folder, rotation, elevation, frames):
    for name in ("img", "mask", "camera"):
        (folder / name).mkdir(parents=True)
    np.save(folder / "camera" / "rotation.npy", np.full(frames, rotation))
    np.save(folder / "camera" / "elevation.npy", np.full((frames, 1), elevation))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    for f in range(frames):
        u, v = seen(center(f), rotation, elevation)
        alpha = np.clip(8 - np.hypot(x - u, y - v), 0, 1)[..., None]
        color = np.rint(alpha * (200, 40, 20) + 255 * (1 - alpha)).astype(np.uint8)
        Image.fromarray(color).save(folder / "img" / f"{f:03}.jpg", quality=95, subsampling=0)
        mask = np.rint(alpha[..., 0] * 255).astype(np.uint8)
        Image.fromarray(mask).save(folder / "mask" / f"{f:03}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two clips of one object, the first with random cameras."""
    folder = tmp_path_factory.mktemp("l4gm")
    for clip, frames in (("036/ball/000", 4), ("036/ball/002", 2)):
        for view in range(16):
            write_camera(folder / l4gm.FIXED / clip / f"{view:03}", 22.5 * view, 0.0, frames)
    for view, elevation in enumerate(ELEVATIONS):
        place = folder / l4gm.RANDOM / "036/ball/000" / f"{view:03}"
        write_camera(place, 77.0 + 100 * view, elevation, 4)
    return folder


@pytest.fixture(scope="module")
def read(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("read") / "data"
    prepare.prepare(made, out, **OPTIONS, log=lambda line: None)
    return out


def test_cameras_agree_with_pictures(read):
    """The ball is where the record's cameras see its place in glTF's frame, which is y up."""
    source = pipeline.ClipSource(read, "train")
    clips = {clip["clip_id"]: clip for clip in (source[i] for i in range(len(source)))}
    assert sorted(clips) == ["036/ball#0", "036/ball#2"]
    assert clips["036/ball#0"]["clip_index"] == 0 and len(clips["036/ball#2"]["frame_times"]) == 2
    pixels = np.arange(32) + 0.5
    for clip in clips.values():
        for name in ("rig", "extra"):
            viewmats, Ks, rgba = (clip[f"{name}_{x}"] for x in ("viewmats", "Ks", "rgba"))
            for f, v in np.ndindex(rgba.shape[:2]):
                x, y, z = center(f)
                camera = viewmats[v] @ [x, z, -y, 1]
                expected = (Ks[v] @ camera[:3])[:2] / camera[2]
                mask = rgba[f, v, ..., 3] / 255.0
                found = (mask.sum(0) @ pixels, mask.sum(1) @ pixels) / mask.sum()
                np.testing.assert_allclose(found, expected, atol=0.15)
                solid = rgba[f, v][mask > 0.99][:, :3].astype(int)
                assert np.abs(solid - (200, 40, 20)).max() <= 6
    height = np.linalg.inv(clips["036/ball#0"]["extra_viewmats"])[:, 1, 3] / 1.5
    np.testing.assert_allclose(height, np.sin(np.deg2rad(ELEVATIONS[:2])), atol=1e-5)
    assert not (read.parent / "data" / "work").exists()


def test_edges_have_the_colour_of_the_object():
    alpha = np.array([[0.0, 51.0, 255.0]])
    white = np.array([[[255.0] * 3, [244.0, 212.0, 204.0], [200.0, 40.0, 0.0]]])
    np.testing.assert_array_equal(
        l4gm.straight(white, alpha), [[[0, 0, 0, 0], [200, 40, 0, 51], [200, 40, 0, 255]]]
    )


@pytest.mark.parametrize("what", ["moves", "mask", "gap", "object", "shape", "huge"])
def test_a_clip_that_is_not_right_is_quarantined(made, tmp_path, what):
    shutil.copytree(made / l4gm.FIXED, tmp_path / "in")
    view = tmp_path / "in/036/ball/002/004"
    if what == "moves":
        np.save(view / "camera" / "rotation.npy", np.arange(2.0))
    elif what == "mask":
        (view / "mask" / "001.png").write_bytes((view / "mask" / "001.png").read_bytes()[:50])
    elif what == "gap":
        shutil.rmtree(view)
    elif what == "object":
        np.save(view / "camera" / "elevation.npy", np.array([{}]), allow_pickle=True)
    elif what == "shape":
        path = view / "camera" / "elevation.npy"
        path.write_bytes(path.read_bytes().replace(b"(2, 1), }     ", b"(2000000000,)}"))
    else:
        Image.new("L", (5000, 1)).save(view / "img" / "000.jpg")
    manifest = prepare.prepare(tmp_path / "in", tmp_path / "out", **OPTIONS, log=lambda line: None)
    assert [c["clip_id"] for c in manifest["clips"]] == ["036/ball#0"]
    (told,) = json.loads((tmp_path / "out" / "report.json").read_text())["quarantined"]
    reasons = {
        "moves": "the camera 004 moves: its rotation goes from 0 to 1 degrees",
        "mask": "004/mask/001.png cannot be read",
        "gap": "no camera at azimuth 270, elevation 0, as --views 4 wants: 15 are there",
        "object": "004/camera/elevation.npy is no NumPy file of numbers",
        "shape": "004/camera/elevation.npy is no NumPy file of numbers",
        "huge": "004/img/000.jpg is (5000, 1), more than 4096 pixels a side",
    }
    assert told["file"] == "036/ball/002" and reasons[what] in told["reason"]


def test_from_the_command_line_in_shards_and_by_a_list(made, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("036/ball/000\n036/gone/000\n")
    flags = ["prepare", "--renders", str(made), "--list", str(tmp_path / "list.txt"), "--work"]
    flags += [str(tmp_path / "work"), "--image_size", "16", "--max_frames", "2", "--workers", "1"]
    assert not main([*flags, "--shard", "0/1"])
    assert not main([*flags, "--out", str(tmp_path / "out")])
    assert "1 file quarantined (of which 1 not there)" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["missing"] == ["036/gone/000"] and report["clips_kept"] == 1
    assert report["reasons"] == {"quarantined": {"cannot be read": 1}, "dropped": {}}
    for more in (
        ["--flow"],
        ["--rigs", "2"],
        ["--assets", str(made)],
        ["--zoom", "0.6", "1"],
        ["--shift", "0.1"],
    ):
        assert main([*flags, "--out", str(tmp_path / "no"), *more]) == 2
        told = capsys.readouterr().err
        assert "needs GLB files" in told or "not both" in told


def test_renders_of_diffusion4d_are_named(tmp_path):
    (tmp_path / "in" / "uid").mkdir(parents=True)
    (tmp_path / "in" / "uid" / "multi_frame0.png").touch()
    with pytest.raises(ValueError, match="multi_frame0.png is of Diffusion4D, whose camera moves"):
        prepare.prepare(tmp_path / "in", tmp_path / "out", **OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clip of L4GM's layout below"):
        prepare.prepare(tmp_path / "empty", tmp_path / "out", **OPTIONS)
