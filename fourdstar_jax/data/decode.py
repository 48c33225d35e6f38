"""Has `untrusted.py` decode pictures and videos, in a process of its own; imports nothing large.

So commands can `check` what they are given before they load what the rest needs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourdstar_jax import arguments

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8

FPS, TIMESTEPS = 8.0, 8  # of the models so far
MAX_FRAMES = 10_000
MAX_PIXELS = 64_000_000
MIN_SIDE = 16


def decode(path: Path, **request: Any) -> "tuple[UInt8[np.ndarray, 'T h w 4'], dict[str, Any]]":
    """Frames of a file or folder, and what was read: see `untrusted.read`.

    Raises ValueError, in one line that names the file, for anything that cannot be used.
    """
    import numpy as np

    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} may not be read")
    timeout_s = request["timeout_s"]
    script = Path(__file__).with_name("untrusted.py")
    with tempfile.TemporaryDirectory(prefix="fourdstar-") as out:
        request |= {"path": str(path.resolve()), "out": out, "min_side": MIN_SIDE}
        try:
            process = subprocess.run(
                [sys.executable, "-P", str(script), json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=timeout_s,
                # threads of these libraries would only use up the memory limit
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{path} was not decoded within {timeout_s=}") from None
        lines = process.stderr.decode(errors="replace").strip().splitlines()
        if process.returncode == 3 and lines:
            raise ValueError(lines[-1].replace(str(path.resolve()), str(path)))
        if process.returncode != 0:
            why = lines[-1] if lines else f"the decoder ended with code {process.returncode}"
            raise ValueError(f"{path} could not be decoded: {why}")
        frames = np.load(Path(out) / "frames.npy", allow_pickle=False)
        info = json.loads((Path(out) / "info.json").read_text())
    return frames, info


def check(
    path: Path,
    *,
    timesteps: int | None = None,
    start: float = 0.0,
    fps: float | None = None,
    folder_fps: float = FPS,
    max_frames: int = MAX_FRAMES,
) -> None:
    """Raises ValueError unless the frames that `read_video` would take can be read.

    Where `timesteps` or `fps` are the model's, which is not known yet: about those.
    """
    decode(
        arguments.there(path),
        start=start,
        fps=fps or FPS,
        folder_fps=folder_fps,
        timesteps=timesteps or TIMESTEPS,
        max_frames=max_frames,
        max_pixels=MAX_PIXELS,
        timeout_s=120,
        max_memory=4 << 30,
    )
