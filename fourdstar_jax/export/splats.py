"""`splats.safetensors`: moving Gaussians in one file, after activation, nothing lost."""

import json
import os
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from fourdstar_jax.folders import OBJECT, check_object
from fourdstar_jax.geometry import Rig
from fourdstar_jax.outside import Fields, parse, read
from fourdstar_jax.types import Gaussians

MAX_HEADER = 1 << 20  # bytes


def write_splats(path: str | os.PathLike[str], gaussians: Gaussians, *, fps: float) -> None:
    """Writes `[T, G, ...]` Gaussians: float32, quats wxyz, scales and opacities linear."""
    arrays = {
        name: np.ascontiguousarray(value, np.float32) for name, value in gaussians._asdict().items()
    }
    if arrays["means"].ndim != 3:
        raise ValueError(f"{arrays['means'].shape=} must be [T, G, 3]")
    # One key: safetensors writes several in an order that changes from call to call.
    metadata = {"fourdstar_jax": json.dumps({"version": 1, "axes": "RUB", "fps": float(fps)})}
    Path(path).write_bytes(safetensors.numpy.save(arrays, metadata))


def read_splats(path: str | os.PathLike[str]) -> tuple[Gaussians, float]:
    """The Gaussians (numpy, `[T, G, ...]`) and the frames a second.

    Raises ValueError for files that are not of this kind.
    """
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER:
                raise ValueError(f"{path}: header above {MAX_HEADER} bytes")
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if names != set(Gaussians._fields) or "fourdstar_jax" not in metadata:
                raise ValueError(f"{path} holds {sorted(names)}, not Gaussians")
            gaussians = Gaussians(**{name: file.get_tensor(name) for name in Gaussians._fields})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    about = parse(metadata["fourdstar_jax"].encode(), f"{path}: its metadata")
    fps = Fields(about, f"{path}: its metadata").number("fps", 1e-3, 1000)
    lead = gaussians.means.shape[:2]
    tails = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "colors": (3,)}
    for name, value in gaussians._asdict().items():
        if value.shape != (*lead, *tails[name]):
            raise ValueError(f"{path}: {name} has shape {value.shape}, means {lead}")
    return gaussians, fps


def read_output(folder: str | os.PathLike[str]) -> tuple[Gaussians, Rig]:
    """The Gaussians `[T, G, ...]` and the rig of an output of `generate` or `reconstruct`.

    Raises ValueError if the folder is no such output.
    """
    folder = Path(folder)
    check_object(folder)
    gaussians, _ = read_splats(folder / "splats.safetensors")
    where = folder / OBJECT.manifest
    return gaussians, Rig.from_dict(read(where).part("rig").values, f"{where}: rig")
