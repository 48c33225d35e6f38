"""Writes mp4 files, the same bytes for the same images, and renders objects into them."""

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from jaxtyping import Float

from fourdstar_jax import geometry
from fourdstar_jax.kernels.rasterize import rasterize
from fourdstar_jax.types import Cameras, Gaussians

ORBIT_FPS = 24
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


def render_frames(
    gaussians: Gaussians, cameras: Cameras, times: Sequence[int], *, size: int
) -> Iterator[Float[np.ndarray, "h w 3"]]:
    """Renders timestep `times[i]` of `[T, G, ...]` Gaussians with camera i of `[frames, ...]`."""

    for index, time in enumerate(times):
        splats = Gaussians(*(np.asarray(x[time], np.float32) for x in gaussians))
        camera = Cameras(cameras.viewmats[index : index + 1], cameras.Ks[index : index + 1])
        # not inside jit: the call then makes room for exactly the pairs that there are
        out = rasterize(splats, camera, width=size, height=size, background=np.ones(3, np.float32))
        yield np.asarray(out.renders[0])


def write_orbit(
    path: str | os.PathLike[str],
    gaussians: Gaussians,
    *,
    fps: float,
    size: int,
    radius: float,
    fov_deg: float,
    seconds: float = 3.0,
    track: Callable[[Iterator], Iterator] = iter,
) -> None:
    """One turn around the object while its clip repeats."""
    count = round(seconds * ORBIT_FPS)
    cameras = geometry.orbit_cameras(
        np.arange(count) * 360 / count, radius=radius, fov_deg=fov_deg, width=size, height=size
    )
    times = (np.arange(count) * fps / ORBIT_FPS).astype(int) % len(gaussians.means)
    frames = track(render_frames(gaussians, cameras, times.tolist(), size=size))
    write_video(path, np.stack(list(frames)), fps=ORBIT_FPS)


def fixed_view(
    gaussians: Gaussians, azimuth_deg: float, *, size: int, radius: float, fov_deg: float
) -> Float[np.ndarray, "T h w 3"]:
    """Every timestep seen from one azimuth."""
    count = len(gaussians.means)
    cameras = geometry.orbit_cameras(
        [azimuth_deg] * count, radius=radius, fov_deg=fov_deg, width=size, height=size
    )
    return np.stack(list(render_frames(gaussians, cameras, range(count), size=size)))


def repeated(images: Float[np.ndarray, "T h w 3"], fps: float) -> Float[np.ndarray, "frames h w 3"]:
    """The clip as often as fills FIXED_SECONDS."""
    return np.concatenate([images] * max(1, int(np.ceil(FIXED_SECONDS * fps / len(images)))))
