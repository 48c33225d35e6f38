"""An object's output folder in other formats, for `fourdstar export`."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from fourdstar_jax import arguments
from fourdstar_jax.export import compact, formats, page, pictures, ply, splats, video
from fourdstar_jax.folders import EXPORT, file_sha256
from fourdstar_jax.geometry import Rig
from fourdstar_jax.types import Gaussians

# A file a timestep, in a folder of the format's name: what it ends in, and who writes it.
SEQUENCES = {
    "splat": (".splat", formats.splat),
    "spz": (".spz", formats.spz),
    "compressed_ply": (".compressed.ply", formats.compressed_ply),
    "glb": (".glb", formats.glb),
}
FORMATS = ("ply", *SEQUENCES, "splat4d", "4dg", "viewer", "tracks", "mp4", "gif", "webp", "sheet")
SPLAT4D_MM = 1.0  # largest error of a position, thousandths of a scene unit
SHEET_TIMESTEPS = 8  # at most, evenly over the clip


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    wanted: Iterable[str],
    *,
    size: int = 256,
) -> None:
    """Writes an output folder's object to the existing, empty folder `out` in these `FORMATS`.

    `size` is of pictures, in pixels. Raises ValueError for what cannot be written.
    """
    out = arguments.path("out", out)
    wanted = tuple(arguments.choice("format", name, FORMATS) for name in dict.fromkeys(wanted))
    size = arguments.whole("size", size, *arguments.SIDE)
    gaussians, rig = splats.read_output(source)

    @functools.cache
    def turn() -> Float[np.ndarray, "frames size size 3"]:
        return video.orbit(render(), fps=rig.fps)

    @functools.cache
    def render() -> video.Renderer:
        return video.Renderer(gaussians, size=size, radius=rig.radius, fov_deg=rig.fov_deg)

    for name in wanted:
        match name:
            case "ply":
                (out / name).mkdir()
                for path, frame in _frames(out / name, ".ply", gaussians):
                    ply.write_ply(path, frame)
            case "splat" | "spz" | "compressed_ply" | "glb":
                suffix, written = SEQUENCES[name]
                (out / name).mkdir()
                for path, frame in _frames(out / name, suffix, gaussians):
                    path.write_bytes(written(frame))
            case "splat4d":
                _write_splat4d(out / "object.splat4d", gaussians, fps=rig.fps)
            case "4dg":
                (out / "object.4dg").write_bytes(compact.encode(gaussians, fps=rig.fps))
            case "viewer":
                if not page.write_page(out / page.NAME, [page.object_of(source)]):
                    raise ValueError(f"{page.NAME} would be over {page.MAX_BYTES >> 20} MB")
            case "tracks":
                _write_tracks(out / "tracks.npz", gaussians, fps=rig.fps)
            case "mp4":
                video.write_video(out / "orbit.mp4", turn(), fps=video.ORBIT_FPS)
            case "gif" | "webp":
                video.write_animation(out / f"orbit.{name}", turn())
            case "sheet":
                _write_sheet(out / "sheet.png", render(), rig)
    files = sorted(f for f in out.rglob("*") if f.is_file())
    content: dict[str, Any] = {
        "exported_from": Path(source).resolve().name,
        "formats": list(wanted),
        "timesteps": len(gaussians.means),
        "gaussians": gaussians.means.shape[1],
        "fps": rig.fps,
        "files": {str(f.relative_to(out)): file_sha256(f) for f in files},
    }
    (out / EXPORT.manifest).write_text(json.dumps(content, indent=2) + "\n")


def _frames(folder: Path, suffix: str, gaussians: Gaussians) -> Iterable[tuple[Path, Gaussians]]:
    for t in range(len(gaussians.means)):
        yield folder / f"frame_{t:04d}{suffix}", Gaussians(*(x[t] for x in gaussians))


def _write_splat4d(path: Path, gaussians: Gaussians, *, fps: float) -> None:
    """The whole clip in one file, by the program `splat4d`, which checks its own error bounds."""
    program = shutil.which("splat4d")
    if program is None:
        raise ValueError("format splat4d needs the program splat4d: pip install splats4d")
    with tempfile.TemporaryDirectory() as folder:
        for file, frame in _frames(Path(folder), ".splat", gaussians):
            file.write_bytes(formats.splat(frame))
        command = [program, "encode", "-i", folder, "-o", str(path), "--fps", f"{fps:g}"]
        command += ["--pos-mm", f"{SPLAT4D_MM:g}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not path.is_file():
        told = (result.stderr or result.stdout).strip().splitlines() or ["no reason given"]
        raise ValueError(f"splat4d encode failed with exit code {result.returncode}: {told[-1]}")


def _write_tracks(path: Path, gaussians: Gaussians, *, fps: float) -> None:
    """Where each Gaussian is at each timestep: `np.load(path)["means"]` is `[T, G, 3]`, y up."""
    np.savez_compressed(
        path,
        means=np.asarray(gaussians.means, np.float32),
        opacities=np.asarray(gaussians.opacities, np.float32),
        colors=np.asarray(gaussians.colors, np.float32),
        fps=np.float32(fps),
    )


def _write_sheet(path: Path, render: video.Renderer, rig: Rig) -> None:
    """The rig's views in rows, timesteps from left to right."""
    count = len(render.gaussians.means)
    shown = np.unique(np.linspace(0, count - 1, min(count, SHEET_TIMESTEPS)).round().astype(int))
    images = [render(int(t), azimuth) for azimuth in rig.azimuths_deg for t in shown]
    pictures.write_sheet(path, np.stack(images), columns=len(shown))
