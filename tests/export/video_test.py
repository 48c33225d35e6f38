"""Videos: colours and times survive, the same images give the same bytes; the whole output."""

import dataclasses
import hashlib
import json

import av
import numpy as np
import pytest
from PIL import Image

from fourdstar_jax import export
from fourdstar_jax.export import video
from fourdstar_jax.generate import Object4D
from fourdstar_jax.geometry import Rig
from fourdstar_jax.kernels.rasterize import api, binning, rasterize
from fourdstar_jax.types import Gaussians


def decode(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def test_video_keeps_colours_count_and_speed(tmp_path):
    colours = [(0.9, 0.1, 0.1), (0.1, 0.8, 0.2), (0.2, 0.2, 0.9)]
    images = np.stack([np.broadcast_to(np.float32(c), (33, 47, 3)) for c in colours])
    video.write_video(tmp_path / "a.mp4", images, fps=8)
    frames, fps = decode(tmp_path / "a.mp4")
    assert frames.shape == (3, 34, 48, 3) and fps == 8  # even sizes
    np.testing.assert_allclose(frames[:, 16, 20] / 255, colours, atol=0.03)


def test_same_images_same_bytes(tmp_path):
    images = np.random.default_rng(0).uniform(0, 1, (5, 32, 32, 3)).astype(np.float32)
    for name in ("a.mp4", "b.mp4"):
        video.write_video(tmp_path / name, images, fps=8)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_no_frames():
    with pytest.raises(ValueError, match="no frames"):
        video.write_video("never.mp4", np.zeros((0, 4, 4, 3), np.float32), fps=8)


@pytest.fixture(scope="module")
def object4d():
    """A red Gaussian in front that moves to the right, a blue one behind."""
    T = 3
    means = np.zeros((T, 2, 3), np.float32)
    means[:, 0] = [(x, 0, 0.3) for x in (-0.3, 0.0, 0.3)]
    means[:, 1] = (0, 0, -0.3)
    gaussians = Gaussians(
        means=means,
        quats=np.broadcast_to(np.float32([1, 0, 0, 0]), (T, 2, 4)).copy(),
        scales=np.full((T, 2, 3), 0.06, np.float32),
        opacities=np.full((T, 2), 0.95, np.float32),
        colors=np.broadcast_to(np.float32([[1, 0, 0], [0, 0, 1]]), (T, 2, 3)).copy(),
    )
    rig = Rig.around(2, fps=8.0)
    frames = np.ones((T, 9, 9, 3), np.float32)
    frames[1, :, :, 1:] = 0
    return Object4D(gaussians, rig, np.zeros((T, 4, 2), np.int32), {"seed": 0}, frames)


def test_fixed_views_see_the_motion_from_their_side(object4d):
    render = video.Renderer(object4d.gaussians, size=48, radius=1.5, fov_deg=49.1)

    def columns(azimuth):
        """Where the red one is, in the frames in which the blue one does not hide it."""
        images = video.fixed_view(render, azimuth)[::2]
        red = np.clip(images[..., 0] - images[..., 2], 0, 1)
        return (red.sum(axis=1) * np.arange(48)).sum(axis=1) / red.sum(axis=(1, 2))

    front, back = columns(0.0), columns(180.0)
    assert front[0] < 20 < 28 < front[1]
    assert back[1] < 20 < 28 < back[0]


def test_the_renderer_makes_room_when_it_comes_nearer(object4d, monkeypatch):
    """Pictures with more pairs than the rasterizer makes room for are whole, and compile once."""
    gaussians = object4d.gaussians
    many = Gaussians(*(np.repeat(x, 200, axis=1) for x in gaussians))
    many.scales[0] = 1e-3  # one tile each, then all tiles
    many.scales[1:] = 0.3

    def draw():
        render = video.Renderer(many, size=64, radius=1.5, fov_deg=49.1)
        return [render(t, 0.0) for t in (0, 1, 2, 1)]

    fresh = draw()
    monkeypatch.setattr(binning, "DENSE_LIMIT", 0)
    monkeypatch.setattr(binning, "TRACED_PAIRS_LEAST", 1000)
    capacities = []

    def spy(*args, capacity, **options):
        capacities.append(capacity)
        return rasterize(*args, capacity=capacity, **options)

    monkeypatch.setattr(video, "rasterize", spy)
    for image, want in zip(draw(), fresh, strict=True):
        np.testing.assert_allclose(image, want, atol=1e-6)
    assert np.abs(fresh[1] - fresh[0]).max() > 0.5
    assert capacities[:2] == [None, None] and capacities[2] == capacities[3] > 20_000


def test_all_pictures_are_drawn_by_one_program(object4d, tmp_path):
    """With 5 Gaussians, which move: the number of pairs differs from picture to picture."""
    more = Gaussians(*(np.concatenate([x, x, x[:, :1]], axis=1) for x in object4d.gaussians))
    before = api._rasterize._cache_size()
    export.save(dataclasses.replace(object4d, gaussians=more), tmp_path / "a", size=32)
    assert api._rasterize._cache_size() == before + 1


def test_save_writes_everything_and_again_the_same(object4d, tmp_path):
    export.save(object4d, tmp_path / "a", size=32)
    names = {p.relative_to(tmp_path / "a").as_posix() for p in (tmp_path / "a").rglob("*.*")}
    assert names == {
        *("manifest.json", "README.txt", "splats.safetensors", "orbit.mp4", "input_and_orbit.webp"),
        *("fixed_000.mp4", "fixed_180.mp4", "viewer.html"),
        *(f"ply/frame_000{t}.ply" for t in range(3)),
    }
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["timesteps"], manifest["gaussians"], manifest["fps"]) == (3, 2, 8.0)
    assert manifest["seed"] == 0 and manifest["axes"]["ply"].startswith("LDB")
    assert manifest["axes"]["splats.safetensors"].startswith("RUB")
    for name, digest in manifest["files"].items():
        data = (tmp_path / "a" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
    splats, fps = export.read_splats(tmp_path / "a" / "splats.safetensors")
    np.testing.assert_array_equal(splats.means, object4d.gaussians.means)
    ply = export.read_ply(tmp_path / "a" / "ply" / "frame_0002.ply")
    np.testing.assert_allclose(ply.means, object4d.gaussians.means[2])
    with Image.open(tmp_path / "a" / "input_and_orbit.webp") as beside:
        assert beside.size == (64, 32) and beside.n_frames == 36 and beside.info["loop"] == 0
        beside.seek(2)  # 1/6 s: the second frame of the input
        shown = np.asarray(beside.convert("RGB"), int)
    assert (np.abs(shown[8:24, 8:24] - [255, 0, 0]) < 12).all() and shown[4, 36].min() > 240
    frames, fps = decode(tmp_path / "a" / "orbit.mp4")
    assert len(frames) == 72 and fps == video.ORBIT_FPS

    export.save(object4d, tmp_path / "b", size=32)
    manifests = [(tmp_path / x / "manifest.json").read_bytes() for x in "ab"]
    assert manifests[0] == manifests[1]  # and so all files, whose hashes it holds


def test_truth_stands_beside(object4d, tmp_path):
    truth = np.zeros((3, 2, 16, 16, 3), np.float32)
    export.write(object4d, tmp_path, size=32, truth=truth)
    frames, _ = decode(tmp_path / "fixed_000.mp4")
    assert frames.shape[1:3] == (32, 64)
    assert frames[:, :, :28].max() < 30 and frames[:, 2, 60].min() > 220
    assert len(frames) >= 16  # short clips repeat
