"""Draws posed meshes with Blender's Cycles, in a process of its own; exact maps stay `render`'s.

The process runs `blender_script.py`, which says how the two talk.
"""

import functools
import io
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from fourdstar_jax.data import render
from fourdstar_jax.data.gltf import Asset
from fourdstar_jax.types import Cameras

SCRIPT = Path(__file__).with_name("blender_script.py")
START_S = 120.0  # a Blender on a slow disk may take its time to start
END_S = 10.0
THREADS = "FOURDSTAR_BLENDER_THREADS"  # the environment's variable: of a Blender, else one a core
_READY = b"fourdstar-blender "


class Failed(Exception):
    """Blender ended before it had drawn; one line says how."""


class Program(NamedTuple):
    """A Blender that starts."""

    command: tuple[str, ...]  # our script follows
    version: str


@functools.cache
def find(program: str | Path) -> Program:
    """Tries whether a program is Blender or a Python that has `bpy`.

    Raises ValueError, in one line, if it is neither.
    """
    path = shutil.which(program)
    if path is None:
        raise ValueError(f"--blender {program}: there is no such program")
    options = "--background", "--factory-startup", "--python-exit-code", "1", "--python"
    said = ""
    for command in ((path, *options), (path, "-P")):
        try:
            done = subprocess.run(
                _call(command, 1, 1),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=START_S,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            said = " ".join(str(error).split())
            continue
        for line in done.stdout.splitlines():
            if line.startswith(_READY) and done.returncode == 0:
                return Program(command, line.removeprefix(_READY).decode().strip())
        said = _last_line(done.stderr)
    raise ValueError(
        f"--blender {program} is neither Blender nor a Python that has bpy" + (said and f": {said}")
    )


class Renderer(render.Renderer):
    """As `render.Renderer`, with colours and alpha by Blender: `samples` a pixel, a fixed seed.

    `load` and `draw` raise `Failed` if Blender ends; the next `load` starts it anew.
    """

    def __init__(self, program: Program, size: int, views: int, *, samples: int):
        super().__init__(size, views)
        self._command = _call(program.command, size, samples)
        self._process: subprocess.Popen | None = None
        self._start()  # before a worker's limit of memory, which no GPU's driver would bear

    def load(self, asset: Asset) -> None:
        """Takes an asset's triangles, colours and textures; `draw` then needs positions only."""
        super().load(asset)
        if self._process is None:
            self._start()
        surfaces = list(dict.fromkeys(draw.surface for draw in asset.draws))
        surface = np.full(len(asset.triangles), -1, np.int32)
        for draw in asset.draws:
            surface[draw.first : draw.first + draw.count] = surfaces.index(draw.surface)
        drawn = surface >= 0
        self._send(
            triangles=asset.triangles[drawn],
            surface=surface[drawn],
            surfaces=np.array(surfaces, np.float64).reshape(-1, 5),
            uv=asset.uvs,
            emissive_uv=asset.emissive_uvs,
            emission=asset.emission,
            color=asset.colors,
            wraps=np.array(
                [(t.wrap_u, t.wrap_v, "smooth" if t.smooth else "nearest") for t in asset.textures]
            ).reshape(-1, 3),
            **{f"image_{i}": texture.image for i, texture in enumerate(asset.textures)},
        )
        self._answer()

    def draw(
        self,
        positions: Float32[np.ndarray, "P 3"],
        normals: Float32[np.ndarray, "P 3"],
        cameras: Cameras,
        *,
        next_positions: Float32[np.ndarray, "P 3"] | None = None,
        depth: bool = False,
    ) -> render.Frame:
        """One timestep of the loaded asset; flow leads to `next_positions`, the cameras stay."""
        from PIL import Image

        frame = super().draw(
            positions, normals, cameras, next_positions=next_positions, depth=depth
        )
        viewmats, Ks = map(np.asarray, cameras)
        self._send(positions=positions, normals=normals, viewmats=viewmats, Ks=Ks)
        rgba = [np.asarray(Image.open(io.BytesIO(self._answer()))) for _ in viewmats]
        return frame._replace(rgba=np.stack(rgba))

    def close(self) -> None:
        """Ends Blender and frees the context; the renderer cannot be used afterwards."""
        self._end()
        super().close()

    def _start(self) -> None:
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_READY):
                return
        raise self._failed()

    def _send(self, **arrays: np.ndarray) -> None:
        if self._process is None:
            raise Failed("Blender has ended")
        assert self._process.stdin is not None
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        message = content.getvalue()
        try:
            self._process.stdin.write(len(message).to_bytes(8, "little") + message)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None

    def _answer(self) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        head = self._process.stdout.read(8)
        length = int.from_bytes(head, "little")
        content = self._process.stdout.read(length)
        if len(head) < 8 or len(content) < length:
            raise self._failed()
        return content

    def _failed(self) -> Failed:
        """What is to be raised once Blender has ended."""
        assert self._process is not None
        code = self._process.wait()
        self._stderr.seek(0)
        said = _last_line(self._stderr.read())
        self._end()
        if code < 0:
            return Failed(f"Blender ended with {signal.Signals(-code).name}")
        return Failed(f"Blender ended with code {code}" + (said and f": {said}"))

    def _end(self) -> None:
        if self._process is not None:
            try:
                self._process.communicate(timeout=END_S)  # it ends with its input, and clears up
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.communicate()
            self._stderr.close()
            self._process = None


def _call(command: tuple[str, ...], size: int, samples: int) -> list[str]:
    threads = os.environ.get(THREADS, "0")
    return [*command, str(SCRIPT), "--", str(size), str(samples), threads]


def _last_line(text: bytes) -> str:
    lines = text.decode(errors="replace").strip().splitlines()
    return " ".join(lines[-1].split())[:200] if lines else ""
