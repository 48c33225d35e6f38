"""Writes mp4 files, the same bytes for the same images, and renders objects into them."""

import os
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Float
from PIL import Image

from fourdstar_jax import geometry
from fourdstar_jax.kernels.rasterize import pick_capacity, rasterize
from fourdstar_jax.kernels.rasterize.binning import default_capacity
from fourdstar_jax.kernels.rasterize.tiles import Grid
from fourdstar_jax.types import Gaussians, Rendered

ORBIT_FPS = 24
ORBIT_FRAMES = 3 * ORBIT_FPS
FIXED_SECONDS = 2.0  # a fixed view repeats the clip for at least so long


def write_video(
    path: str | os.PathLike[str], images: Float[np.ndarray, "frames h w 3"], *, fps: float
) -> None:
    """H.264 mp4, yuv420p, of images in [0, 1]; odd sizes get a white row or column.

    One thread and no dates: the same images give the same bytes.
    """
    frames = np.rint(np.clip(np.asarray(images), 0, 1) * 255).astype(np.uint8)
    if len(frames) == 0:
        raise ValueError("images holds no frames")
    height, width = frames.shape[1:3]
    pad = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    frames = np.pad(frames, pad, constant_values=255)
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    # x264's choice of B-frames was seen to differ between two calls with the same images.
    x264 = {"crf": "16", "x264-params": "bframes=0:mbtree=0:rc-lookahead=0"}
    options = {"threads": "1", **(x264 if codec == "libx264" else {"qscale": "2"})}
    container = {"movflags": "+faststart", "fflags": "+bitexact"}
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(os.fspath(path), "w", format="mp4", options=container) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))


class Renderer:
    """Pictures of `[T, G, ...]` Gaussians from around them, on white, one at a time.

    One program draws them all: the rasterizer's own capacity does nearly always, and where it does
    not, the larger one that was found is kept.
    """

    def __init__(self, gaussians: Gaussians, *, size: int, radius: float, fov_deg: float):
        self.gaussians = Gaussians(*(np.asarray(x, np.float32) for x in gaussians))
        self._radius, self._fov_deg, self._size = radius, fov_deg, size
        self._capacity: int | None = None
        self._room = default_capacity(1, self.gaussians.means.shape[1], Grid(8, size, size))

    def __call__(self, timestep: int, azimuth_deg: float) -> Float[np.ndarray, "h w 3"]:
        splats = Gaussians(*(x[timestep] for x in self.gaussians))
        white, size = np.ones(3, np.float32), self._size
        cameras = geometry.orbit_cameras(
            [azimuth_deg], radius=self._radius, fov_deg=self._fov_deg, width=size, height=size
        )

        def render(capacity: int | None) -> Rendered:
            return rasterize(
                splats, cameras, width=size, height=size, background=white, capacity=capacity
            )

        out = render(self._capacity)
        if out.overflow:  # only with a capacity from another picture
            out = render(None)
        count = int(out.num_intersections)
        if count > (self._capacity or self._room):
            self._capacity = pick_capacity(int(1.5 * count))
        return np.asarray(out.renders[0])


def orbit(
    render: Renderer, *, fps: float, on_frame: Callable[[], None] = lambda: None
) -> Float[np.ndarray, "frames h w 3"]:
    """One turn around the object at ORBIT_FPS, while its clip repeats.

    `on_frame` is called after each frame.
    """
    timesteps = len(render.gaussians.means)
    images = []
    for i in range(ORBIT_FRAMES):
        images.append(render(int(i * fps / ORBIT_FPS) % timesteps, 360 * i / ORBIT_FRAMES))
        on_frame()
    return np.stack(images)


def write_beside(
    path: str | os.PathLike[str],
    frames: Float[np.ndarray, "T h w 3"],
    turn: Float[np.ndarray, "frames s s 3"],
    *,
    fps: float,
) -> None:
    """An endless WebP: frames of `fps`, repeated, left of `orbit`'s; every second one of those."""
    size = turn.shape[1]
    left = np.stack([resized(frame, size) for frame in frames])
    shown = range(0, len(turn), 2)
    times = [int(i * fps / ORBIT_FPS) % len(left) for i in shown]
    _write_endless(path, np.concatenate([left[times], turn[::2]], axis=2))


def write_animation(path: str | os.PathLike[str], turn: Float[np.ndarray, "frames s s 3"]) -> None:
    """An endless WebP or GIF, by the path's end, of every second frame of `orbit`."""
    _write_endless(path, turn[::2])


def _write_endless(path: str | os.PathLike[str], images: Float[np.ndarray, "frames h w 3"]) -> None:
    first, *rest = (
        Image.fromarray(np.rint(255 * np.clip(x, 0, 1)).astype(np.uint8)) for x in images
    )
    milliseconds = round(2000 / ORBIT_FPS)
    first.save(path, save_all=True, append_images=rest, duration=milliseconds, loop=0, quality=80)


def resized(image: Float[np.ndarray, "h w 3"], size: int) -> Float[np.ndarray, "s s 3"]:
    """An image in [0, 1] with `size` pixels a side, bicubic."""
    picture = Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def fixed_view(render: Renderer, azimuth_deg: float) -> Float[np.ndarray, "T h w 3"]:
    """Every timestep seen from one azimuth."""
    return np.stack([render(t, azimuth_deg) for t in range(len(render.gaussians.means))])


def repeated(images: Float[np.ndarray, "T h w 3"], fps: float) -> Float[np.ndarray, "frames h w 3"]:
    """The clip as often as fills FIXED_SECONDS."""
    return np.concatenate([images] * max(1, int(np.ceil(FIXED_SECONDS * fps / len(images)))))
