"""Writes what generation made: Gaussians, a page that plays them, videos, and a manifest."""

import json
import os
import typing
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fourdstar_jax import arguments, bars
from fourdstar_jax.export import page, ply, video
from fourdstar_jax.export.ply import read_ply, write_ply
from fourdstar_jax.export.splats import read_splats, write_splats
from fourdstar_jax.folders import OBJECT, file_sha256, output_folder
from fourdstar_jax.generate import Object4D

__all__ = ["read_ply", "read_splats", "save", "write", "write_ply", "write_splats"]

SCHEMA_VERSION = 1
AXES = {
    "splats.safetensors": "RUB: x right, y up, z towards the camera of azimuth 0",
    "ply": ply.AXES,
}
UNITS = "an object of training is about 0.8 high over its clip; cameras stand at `radius`"
README = """\
Open viewer.html in a browser: it needs no network. Drag to turn, space to play.
Or watch input_and_orbit.webp (what the model saw, and the object from all around), orbit.mp4 and
fixed_*.mp4 (azimuth in degrees).
ply/ is a sequence of 3D Gaussian PLY files: drop the folder into a splat viewer that plays
sequences, such as SuperSplat. As usual for such files y points down in them, and viewers stand
them up. splats.safetensors has the same as arrays with y up (see manifest.json).
"""


@typing.no_type_check  # arguments are checked below, in the tests as elsewhere
def save(
    object4d: Object4D,
    path: str | os.PathLike[str],
    *,
    size: int = 256,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes an object to the folder `path`, whole or not at all; videos of `size` pixels a side.

    Raises ValueError if the folder is not empty, unless `overwrite` and it is an earlier output.
    """
    if not isinstance(object4d, Object4D):
        raise ValueError(f"object4d={arguments.shown(object4d)} must be an Object4D")
    path, size = arguments.path("path", path), arguments.whole("size", size, *arguments.SIDE)
    with output_folder(path, OBJECT, overwrite=overwrite) as folder:
        write(object4d, folder, size=size, progress=progress)


def write(
    object4d: Object4D,
    folder: Path,
    *,
    size: int = 256,
    truth: Float[np.ndarray, "T V h w 3"] | None = None,
    progress: bool = False,
) -> None:
    """Fills an existing, empty folder. With `truth`, the rig's views of it stand left of ours."""
    gaussians, rig = object4d.gaussians, object4d.rig
    with bars.waiting("files", disable=not progress):
        write_splats(folder / "splats.safetensors", gaussians, fps=object4d.fps)
        (folder / "ply").mkdir()
        for t in range(len(gaussians.means)):
            frame = type(gaussians)(*(x[t] for x in gaussians))
            write_ply(folder / "ply" / f"frame_{t:04d}.ply", frame)
        seen = object4d.frames if truth is None else truth[:, 0]
        shown = page.describe(_name(object4d), gaussians, rig, frames=seen)
        page.write_page(folder / page.NAME, [shown])
    render = video.Renderer(gaussians, size=size, radius=rig.radius, fov_deg=rig.fov_deg)
    with bars.steps(video.ORBIT_FRAMES, desc="orbit", unit="frame", disable=not progress) as step:
        turn = video.orbit(render, fps=object4d.fps, on_frame=step)
    with bars.waiting("videos", disable=not progress):
        video.write_video(folder / "orbit.mp4", turn, fps=video.ORBIT_FPS)
        if object4d.frames is not None:
            beside = folder / "input_and_orbit.webp"
            video.write_beside(beside, object4d.frames, turn, fps=object4d.fps)
        for view, azimuth in enumerate(rig.azimuths_deg):
            images = video.fixed_view(render, azimuth)
            if truth is not None:
                left = np.stack([video.resized(image, size) for image in truth[:, view]])
                images = np.concatenate([left, images], axis=2)
            images = video.repeated(images, object4d.fps)
            video.write_video(folder / f"fixed_{azimuth:03.0f}.mp4", images, fps=object4d.fps)
    (folder / "README.txt").write_text(README)
    (folder / OBJECT.manifest).write_text(json.dumps(manifest(object4d, folder), indent=2) + "\n")


def _name(object4d: Object4D) -> str:
    """Of the input, for people."""
    about = object4d.meta.get("input", {})
    return Path(str(about.get("name") or about.get("clip") or "object")).stem


def manifest(object4d: Object4D, folder: Path) -> dict[str, Any]:
    """All that is needed to make the object again, and the hashes of the files. No dates."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {
        "schema": "fourdstar_jax object",
        "schema_version": SCHEMA_VERSION,
        "timesteps": object4d.gaussians.means.shape[0],
        "gaussians": object4d.gaussians.means.shape[1],
        "fps": object4d.fps,
        "axes": AXES,
        "units": UNITS,
        "rig": object4d.rig.to_dict(),
        **object4d.meta,
        "files": {str(f.relative_to(folder)): file_sha256(f) for f in files},
    }
