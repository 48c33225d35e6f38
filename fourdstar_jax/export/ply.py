"""PLY files of 3D Gaussians in the layout of the original 3D Gaussian Splatting code (INRIA).

binary_little_endian, one `vertex` element, all float32: x y z nx ny nz f_dc_0..2 opacity
scale_0..2 rot_0..3, with colour = 0.5 + SH_C0 * f_dc, opacity as a logit, scale as a natural
logarithm and the rotation wxyz. Nothing is pruned or sorted: Gaussian g stays in place g.

Axes: captures lie in such files with y down, and viewers (SuperSplat, splat-transform) turn every
PLY by 180 degrees about z to stand it up. So x and y are written negated, with quaternions to
match, and read back likewise: in memory y is up.
"""

import os
import re
from pathlib import Path

import numpy as np
from jaxtyping import Float

from fourdstar_jax.types import Gaussians

SH_C0 = 0.28209479177387814
PROPERTIES = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)
OPTIONAL = {"nx", "ny", "nz", *(f"f_rest_{i}" for i in range(45))}
MAX_HEADER = 16_384  # bytes
OPACITY_MARGIN = 1e-6  # keeps the logit finite
MIN_SCALE = 1e-12  # keeps the logarithm finite
AXES = (
    "LDB: x left, y down, z towards the camera of azimuth 0; turn by 180 degrees about z to stand"
)


def half_turn(
    means: Float[np.ndarray, "G 3"], quats: Float[np.ndarray, "G 4"]
) -> tuple[Float[np.ndarray, "G 3"], Float[np.ndarray, "G 4"]]:
    """Turns by 180 degrees about z: (0, 0, 0, 1) times quats. Twice negates the quaternions."""
    signs = np.array([-1, -1, 1, 1], np.float32)
    return means * signs[:3], quats[:, [3, 2, 1, 0]] * signs


def unit_quats(quats: Float[np.ndarray, "*b 4"]) -> Float[np.ndarray, "*b 4"]:
    """Quaternions of length 1; the identity for those of length 0."""
    norms = np.linalg.norm(quats, axis=-1, keepdims=True)
    return np.where(norms > 1e-12, quats / np.maximum(norms, 1e-12), [1.0, 0.0, 0.0, 0.0])


def write_ply(path: str | os.PathLike[str], gaussians: Gaussians) -> None:
    """Writes one timestep, `[G, ...]`, in the file's axes (`AXES`).

    Raises ValueError for other shapes or non-finite values.
    """
    means, quats, scales, opacities, colors = (np.asarray(x, np.float32) for x in gaussians)
    if means.ndim != 2:
        raise ValueError(f"{means.shape=} must be [G, 3]: one file holds one timestep")
    means, quats = half_turn(means, unit_quats(quats))
    opacities = np.clip(opacities.astype(np.float64), OPACITY_MARGIN, 1 - OPACITY_MARGIN)
    columns = [
        means,
        np.zeros_like(means),
        (colors - 0.5) / SH_C0,
        np.log(opacities / (1 - opacities))[:, None],
        np.log(np.maximum(scales, MIN_SCALE)),
        quats,
    ]
    table = np.concatenate(columns, axis=1).astype("<f4")
    if not np.isfinite(table).all():
        raise ValueError("gaussians hold values that are not finite")
    header = ["ply", "format binary_little_endian 1.0", f"comment axes {AXES}"]
    header += [f"element vertex {len(table)}"]
    header += [f"property float {name}" for name in PROPERTIES]
    Path(path).write_bytes("\n".join([*header, "end_header", ""]).encode() + table.tobytes())


def read_ply(path: str | os.PathLike[str]) -> Gaussians:
    """Reads a PLY of this layout into our axes (y up), as numpy arrays `[G, ...]`.

    Normals and higher harmonics are ignored; every file is taken to be in the axes `AXES`.

    Meant for files from outside: the header is bounded, unknown properties and sizes that do not
    match the file are refused with a ValueError, before anything large is allocated.
    """
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER)
        end = re.search(rb"\nend_header\r?\n", head)
        if not head.startswith(b"ply") or end is None:
            raise ValueError(f"{path} is not a PLY file with a header below {MAX_HEADER} bytes")
        names, count = _parse_header(head[: end.start()].decode("ascii", "replace"), path)
        file.seek(0, os.SEEK_END)
        size = file.tell() - end.end()
        if size != count * len(names) * 4:
            raise ValueError(f"{path}: {count} vertices of {len(names)} floats are not {size} B")
        file.seek(end.end())
        table = np.fromfile(file, "<f4", count * len(names)).reshape(count, len(names))
    column = dict(zip(names, table.T, strict=True))

    def take(*wanted: str) -> Float[np.ndarray, "G n"]:
        return np.stack([column[name] for name in wanted], axis=-1)

    means, quats = half_turn(take("x", "y", "z"), take("rot_0", "rot_1", "rot_2", "rot_3"))
    return Gaussians(
        means=means,
        quats=-quats / np.maximum(np.linalg.norm(quats, axis=-1, keepdims=True), 1e-12),
        scales=np.exp(take("scale_0", "scale_1", "scale_2")),
        opacities=(1 / (1 + np.exp(-column["opacity"].astype(np.float64)))).astype(np.float32),
        colors=np.float32(0.5) + np.float32(SH_C0) * take("f_dc_0", "f_dc_1", "f_dc_2"),
    )


def _parse_header(header: str, path: str | os.PathLike[str]) -> tuple[list[str], int]:
    names: list[str] = []
    count = None
    for line in header.split("\n")[1:]:
        match line.split():
            case ["format", kind, "1.0"]:
                if kind != "binary_little_endian":
                    raise ValueError(f"{path}: PLY format {kind} is not read")
            case ["comment" | "obj_info", *_]:
                pass
            case ["element", "vertex", number] if number.isdigit() and count is None:
                count = int(number)
            case ["property", "float" | "float32", name] if count is not None:
                if name not in PROPERTIES and name not in OPTIONAL:
                    raise ValueError(f"{path}: unknown PLY property {name!r}")
                names.append(name)
            case _:
                raise ValueError(f"{path}: unexpected PLY header line {line[:80]!r}")
    missing = [name for name in PROPERTIES if name not in names and name not in OPTIONAL]
    if count is None or missing or len(set(names)) != len(names):
        raise ValueError(f"{path}: PLY properties are missing or double: {missing or names}")
    return names, count
