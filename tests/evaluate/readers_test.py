"""Other systems' outputs: small folders of their layouts, read back as what was written."""

import numpy as np
import pytest
from helpers.glb import box_writer, moving_box
from PIL import Image

from fourdstar_jax.data import untrusted, video
from fourdstar_jax.data.decode import MIN_SIDE
from fourdstar_jax.evaluate import protocols, readers
from fourdstar_jax.export.video import write_video

OPEN, PAPER = (protocols.find(n) for n in ("fourdstar-open-v2", "4dstar-video-to-4d"))
LEVELS = (40, 90, 160, 220)


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Pictures are decoded here: a process for each folder is what `data/video_test.py` tests."""

    def decode(path, **request):
        return untrusted.read(path, request | {"min_side": MIN_SIDE})

    monkeypatch.setattr(video, "decode", decode)


def movie(path, levels, size=(16, 16)):
    """A frame of each level, from left to right in as many parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.stack([np.full((size[1], size[0], 3), level / 255) for level in levels])
    write_video(path, frames, fps=8)


def picture(path, level, side=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)


def levels(source, name, **options):
    """Mean grey of each view's frames."""
    views = source.entries[name].views
    return {v.name: [round(f.mean(), -1) for f in v.load(None).images] for v in views}


def test_l4gm(tmp_path):
    strip = np.repeat(np.repeat(np.array(LEVELS) / 255, 16)[None, :, None], 16, axis=0)
    write_video(tmp_path / "wo_interp_cat_fg_fixed.mp4", np.stack([np.tile(strip, 3)] * 3), fps=8)
    movie(tmp_path / "wo_interp_cat_fg.mp4", [0])
    movie(tmp_path / "w_interp_cat_fg_fixed.mp4", [0])
    source = readers.open_source(tmp_path, "l4gm", PAPER)
    assert source.azimuths == protocols.SIDES and "L4GM" in source.about["follows"]
    found = levels(source, "cat_fg")
    assert list(found) == ["azimuth 0", "azimuth 90", "azimuth 180", "azimuth 270"]
    assert [x for x, *_ in found.values()] == [40, 90, 160, 220] and len(found["azimuth 0"]) == 3
    with pytest.raises(ValueError, match="cat_fg: views at 15 degrees are scored; it has 0, 90,"):
        readers.open_source(tmp_path, "l4gm", OPEN, azimuths=(15.0,))
    from fourdstar_jax.cli.evaluate import SYSTEMS

    assert list(SYSTEMS) == list(readers.SYSTEMS)
    with pytest.raises(ValueError, match="nothing that sv4d2 writes: outputs/sv4d2/000000_v001"):
        readers.open_source(tmp_path, "sv4d2", OPEN)


def test_stag4d(tmp_path):
    for step, level in ((500, 0), (7000, 90)):
        for side in ("front", "back"):
            for t in (10, *range(10)):
                picture(tmp_path / "dog" / f"{step}_{side}" / f"{t:02d}.jpg", level + 10 * (t > 9))
    movie(tmp_path / "dog" / "7000_front" / "video.mp4", [0])
    source = readers.open_source(tmp_path, "stag4d", OPEN)
    assert levels(source, "dog") == {
        "azimuth 0": [*[90] * 10, 100],
        "azimuth 180": [*[90] * 10, 100],
    }
    (tmp_path / "dog" / "7000_back" / "04.jpg").unlink()
    with pytest.raises(ValueError, match="04.jpg is missing between 03.jpg and 05.jpg"):
        levels(source, "dog")
    with pytest.raises(ValueError, match="dog: views at -75, 15, .* or 0, 90, .*; it has 0, 180"):
        readers.open_source(tmp_path, "stag4d", PAPER)


def test_sv4d2(tmp_path):
    for number in (0, 1):
        movie(tmp_path / f"{number:06d}_process_input.mp4", [40, 40])
        for view in range(1, 5):
            movie(tmp_path / f"{number:06d}_v{view:03d}.mp4", [50 * view, 50 * view])
    (tmp_path / "names.txt").write_text("camel\nbear\n")
    source = readers.open_source(tmp_path, "sv4d2", OPEN, azimuths=(0.0, 120.0))
    assert list(source.entries) == ["camel", "bear"]
    assert levels(source, "bear") == {"azimuth 0": [40, 40], "azimuth 120": [100, 100]}
    (tmp_path / "names.txt").write_text("camel\n")
    with pytest.raises(ValueError, match="names.txt: 1 names; there is an object 1"):
        readers.open_source(tmp_path, "sv4d2", OPEN)


def test_gvfdiffusion(tmp_path):
    for camera in (0, 32, 64, 96):
        for t in (0, 1):
            name = f"rank_00_render_000003_cam_{camera:03d}_timesteps_{t:02d}.png"
            picture(tmp_path / name, camera + 100 * t)
    source = readers.open_source(tmp_path, "gvfdiffusion", PAPER)
    assert source.azimuths == protocols.SIDES
    assert levels(source, "000003")["azimuth 90"] == [30, 130]
    picture(tmp_path / "rank_01_render_000003_cam_000_timesteps_00.png", 0)
    with pytest.raises(ValueError, match="object 000003 is of ranks 0[01] and 0[01], each of"):
        readers.open_source(tmp_path, "gvfdiffusion", PAPER)


def test_meshes(tmp_path):
    """A box that slides by its width in a second: 25 frames, tracked points and pictures alike."""
    (tmp_path / "m" / "box").mkdir(parents=True)
    (tmp_path / "m" / "box" / "output_animation.glb").write_bytes(moving_box())
    source = readers.open_source(tmp_path / "m", "motion324", PAPER, azimuths=protocols.SIDES)
    entry = source.entries["box"]
    frames = [view.load((16, 16)) for view in entry.views[:2]]
    assert frames[0].images.shape == (25, 16, 16, 3) and frames[0].alphas.max() == 255
    points = entry.gaussians().means
    assert points.shape == (25, readers.MESH_POINTS, 3)
    moved = np.ptp(points[0, :, 0])
    np.testing.assert_allclose(points[-1] - points[0], [[moved, 0, 0]] * len(points[0]), atol=1e-2)
    columns = [np.flatnonzero(a.max(axis=0)).mean() for a in frames[0].alphas[[0, -1]]]
    assert columns[1] > columns[0] + 3  # to the right, seen from the front
    # Keys that are steps, as Blender rounds them: each frame is its own.
    keys = np.arange(8, dtype=np.float32) / np.float32(24)
    writer = box_writer()
    steps = (0, "translation", keys, [[t, 0, 0] for t in range(8)], "STEP")
    writer.animate("steps", steps)
    (tmp_path / "steps.glb").write_bytes(writer.bytes())
    positions = readers._animated(tmp_path / "steps.glb")[1]
    np.testing.assert_allclose(np.diff(positions[:, 0, 0]), 1, atol=1e-5)
    (tmp_path / "m" / "fbx").mkdir()
    (tmp_path / "m" / "fbx" / "output_animation.fbx").write_bytes(b"")
    with pytest.raises(ValueError, match="fbx: FBX is not read"):
        readers.open_source(tmp_path / "m", "motion324", OPEN)


def test_actionmesh(tmp_path):
    """A pyramid that grows, its tip up and drawn out to what its front camera has at the right."""
    folder = tmp_path / "cone"
    folder.mkdir()
    (folder / "mesh_00.glb").write_bytes(b"")
    # As its meshes stand: y is up, and the first camera at +x has -z at its right.
    corners = np.array([[-1, 0, -1], [1, 0, -1], [1, 0, 1], [-1, 0, 1], [0, 1, -2]], np.float32)
    faces = [[0, 1, 2], [0, 2, 3], [1, 0, 4], [2, 1, 4], [3, 2, 4], [0, 3, 4]]
    frames = np.stack([corners * s for s in (0.5, 0.75, 1.0)])
    saved = frames[:, :, [2, 0, 1]] * np.array([-1, 1, 1], np.float32)
    np.save(folder / "deformations_vertices.npy", saved)
    np.save(folder / "deformations_faces.npy", np.array(faces, np.int32))
    source = readers.open_source(tmp_path, "actionmesh", OPEN, azimuths=(0.0,))
    found = source.entries["cone"].views[0].load((24, 24))
    areas = (found.alphas > 127).sum(axis=(1, 2))
    assert areas[0] / areas[2] == pytest.approx(0.25, abs=0.08) and found.images.shape[0] == 3
    blue = found.images[2][found.alphas[2] == 255].mean(axis=0)
    assert blue[2] > blue[1] > blue[0]
    rows, columns = np.nonzero(found.alphas[2] > 127)
    assert columns[rows == rows.min()].mean() > columns[rows == rows.max()].mean() + 3
    points = source.entries["cone"].gaussians().means
    spread = np.ptp(points, axis=1)[:, 0]
    np.testing.assert_allclose(spread / spread[2], [0.5, 0.75, 1], rtol=1e-4)
    # no mirror image: of the asset, normals point out of what is convex
    asset, positions, normals = readers._deformed(folder)
    outwards = positions[2] - positions[2].mean(axis=0)
    assert (np.einsum("vc,vc->v", outwards, normals[2]) > 0).all()
    np.testing.assert_allclose(positions[2][4], [2, 1, 0])
    np.save(folder / "deformations_faces.npy", np.array(faces, np.int32) + 1)
    source = readers.open_source(tmp_path, "actionmesh", OPEN, azimuths=(0.0,))
    with pytest.raises(ValueError, match="faces of other vertices than the 5"):
        source.entries["cone"].views[0].load((24, 24))
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "animated_mesh.glb").write_bytes(b"")
    with pytest.raises(ValueError, match="bird: animated_mesh.glb is not read; deformations_vert"):
        readers.open_source(tmp_path, "actionmesh", OPEN)
