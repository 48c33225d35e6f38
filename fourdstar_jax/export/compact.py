"""Moving Gaussians in a compact form: whole numbers, differences in time, one deflate stream.

A file is 4 bytes of magic, the header's length (uint32, little endian), the header in JSON, and a
zlib stream. That holds 13 rows of numbers for every timestep and Gaussian: position (3), log2 of
the scales (3), vector part of the quaternion (3), opacity, colour as Y Co Cg (3). Numbers are
differences from the timestep before (from 0 at the first), folded to n >= 0 (0, -1, 1, -2 ...);
first come the low bytes of all, `[13, T, G]`, then the high ones. Value = number / steps, and
position = origin + number * position_step, scale = extent * 2^(number / scale_steps).

Axes as in memory (y up). The three axes of an ellipsoid are renamed so that its rotation is as
small as may be, whose real part then is at least 0.85: it follows from the other three. Scales are
at least `LEAST_SCALE`, less than a pixel of most pictures of the whole. While a
Gaussian's opacity rounds to 0 it is not seen, and its other numbers stay at what they are next or
were last. It can be read by a browser with no library (`DecompressionStream`).
"""

import itertools
import json
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from fourdstar_jax.export.ply import unit_quats
from fourdstar_jax.outside import Fields, parse
from fourdstar_jax.types import Array, Gaussians

MAGIC = b"4DG1"
ROWS = 13
MAX_NUMBERS = 1 << 27  # of T * G * ROWS: what a file of this kind may ask for
MAX_HEADER = 1 << 16  # bytes
BOUND = 1 / 512  # of the extent: no position is farther off along an axis, at any precision
WANTED_RATIO = 8.0  # to .splat frames, of 32 bytes for each timestep and Gaussian
SAMPLE = 8192  # Gaussians
LEAST_SCALE = 2.0**-10  # of the extent


class Precision(NamedTuple):
    """Steps to the unit: of the extent, a doubling of the scale, quaternions, 0..1, 0..1."""

    position: int
    scale: int
    rotation: int
    opacity: int
    color: int


PRECISIONS = (  # of which the finest that is WANTED_RATIO times smaller is taken, or the last
    Precision(8192, 16, 127, 255, 255),
    Precision(2048, 8, 63, 127, 127),
    Precision(1024, 5, 32, 63, 63),
    Precision(1024, 4, 24, 47, 47),
    Precision(512, 3, 16, 31, 31),
)


def encode(gaussians: Gaussians, *, fps: float) -> bytes:
    """The compact form of `[T, G, ...]` Gaussians.

    Every position is checked to come back within `BOUND` of the extent, the longest side of the box
    of all positions that are seen. Raises ValueError for values that are not finite.
    """
    means = np.asarray(gaussians.means)
    if means.ndim != 3:
        raise ValueError(f"{means.shape=} must be [T, G, 3]")
    if means.size // 3 * ROWS > MAX_NUMBERS:
        raise ValueError(f"{means.shape=}: there are more than {MAX_NUMBERS // ROWS} of them")
    if not all(np.isfinite(x).all() for x in gaussians):
        raise ValueError("gaussians hold values that are not finite")
    rotations = [_small_rotations(*x) for x in zip(gaussians.quats, gaussians.scales, strict=True)]
    vectors, scales = map(np.stack, zip(*rotations, strict=True))
    stride = 1 + means.shape[1] // SAMPLE  # a part tells first what does not come into question
    parts = [slice(None, None, stride), slice(None)] if stride > 1 else [slice(None)]
    data = b""
    for precision in PRECISIONS:
        for part in parts:
            some = Gaussians(*(np.asarray(x)[:, part] for x in gaussians))
            data = _encode(some, vectors[:, part], scales[:, part], precision, fps=fps)
            small = len(data) * WANTED_RATIO <= 32 * some.opacities.size
            if not small and precision != PRECISIONS[-1]:
                break
        else:
            break
    return data


def decode(data: bytes, where: str = "data") -> tuple[Gaussians, float]:
    """The Gaussians (numpy, `[T, G, ...]`) and the frames a second.

    Raises ValueError, with `where`, for what is not of this kind, before much is allocated.
    """
    size = int.from_bytes(data[4:8], "little")
    if data[:4] != MAGIC or size > min(MAX_HEADER, len(data) - 8):
        raise ValueError(f"{where} is not a compact form of moving Gaussians")
    about = Fields(parse(data[8 : 8 + size], f"{where}: its header"), f"{where}: its header")
    timesteps, count = (about.integer(k, 1, 1 << 24) for k in ("timesteps", "gaussians"))
    numbers = timesteps * count * ROWS
    if numbers > MAX_NUMBERS:
        raise ValueError(f"{where}: {timesteps} x {count} Gaussians are too many")
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(data[8 + size :], 2 * numbers + 1)
    except zlib.error as error:
        raise ValueError(f"{where} is damaged: {error}") from error
    if len(raw) != 2 * numbers or not inflate.eof:
        raise ValueError(f"{where} is damaged: its length is not that of its header")
    low, high = np.frombuffer(raw, np.uint8).reshape(2, ROWS, timesteps, count)
    folded = low.astype(np.int32) | high.astype(np.int32) << 8
    rows = np.cumsum(folded >> 1 ^ -(folded & 1), axis=1, dtype=np.int32)
    table = np.moveaxis(rows, 0, -1).astype(np.float32)  # [T, G, 13]
    origin = np.array(about.numbers("origin", -1e30, 1e30, most=3), np.float32)
    if len(origin) != 3:
        about.refuse("origin", "three numbers")
    extent, step = (about.number(k, 0, 1e30) for k in ("extent", "position_step"))
    scale, rotation, opacity, color = (
        about.integer(f"{k}_steps", 1, 1 << 15) for k in ("scale", "rotation", "opacity", "color")
    )
    vector = table[..., 6:9] / np.float32(rotation)
    real = np.sqrt(np.maximum(1 - np.sum(vector**2, axis=-1, keepdims=True), 0))
    y, co, cg = np.moveaxis(table[..., 10:13] / np.float32(color), -1, 0)
    gaussians = Gaussians(
        means=origin + np.float32(step) * table[..., :3],
        quats=np.concatenate([real, vector], axis=-1),
        scales=np.float32(extent) * np.exp2(table[..., 3:6] / np.float32(scale)),
        opacities=table[..., 9] / np.float32(opacity),
        colors=np.clip(np.stack([y - cg + co, y + cg, y - cg - co], axis=-1), 0, 1),
    )
    return gaussians, about.number("fps", 1e-3, 1000)


def _encode(
    gaussians: Gaussians,
    vectors: Float[np.ndarray, "T G 3"],
    scales: Float[np.ndarray, "T G 3"],
    precision: Precision,
    *,
    fps: float,
) -> bytes:
    """The compact form at one precision, of ellipsoids with their axes renamed."""
    means, opacities, colors = (
        np.asarray(x, np.float64) for x in (gaussians.means, gaussians.opacities, gaussians.colors)
    )
    opacity = np.rint(np.clip(opacities, 0, 1) * precision.opacity).astype(np.int32)
    seen = opacity > 0
    places = means[seen] if seen.any() else np.zeros((1, 3))
    origin = places.min(axis=0)
    extent = float(max((places.max(axis=0) - origin).max(), 1e-6))
    step = extent / precision.position
    red, green, blue = np.moveaxis(np.clip(colors, 0, 1), -1, 0)
    luma = (red + 2 * green + blue) / 4
    color = np.stack([luma, (red - blue) / 2, green - luma], axis=-1)
    columns = [
        (means - origin) / step,
        np.log2(np.maximum(scales / extent, LEAST_SCALE)) * precision.scale,
        vectors * precision.rotation,
        opacity[..., None],
        color * precision.color,
    ]
    table = np.concatenate(columns, axis=-1)
    table = np.where(seen[..., None], np.rint(np.where(seen[..., None], table, 0)), 0)
    table = _held(table.astype(np.int32), seen)
    table[..., 9] = opacity
    again = origin + step * table[..., :3]
    if np.abs(again - means)[seen].max(initial=0) > BOUND * extent:
        raise AssertionError("a position is farther off than what is promised")
    changes = np.moveaxis(np.diff(table, axis=0, prepend=0), -1, 0)  # [13, T, G]
    folded = changes << 1 ^ changes >> 31
    if folded.max(initial=0) > 0xFFFF:
        raise ValueError("gaussians hold scales that are out of all proportion")
    header = {
        "timesteps": len(means),
        "gaussians": means.shape[1],
        "seen": int(seen.any(axis=0).sum()),
        "fps": float(fps),
        "axes": "RUB",
        "origin": origin.tolist(),
        "extent": extent,
        "position_step": step,
        **{f"{name}_steps": x for name, x in precision._asdict().items() if name != "position"},
        "largest_error": {
            "position": step / 2,
            "scale_factor": 2 ** (0.5 / precision.scale),
            "opacity": 0.5 / precision.opacity,
            "color": 1.5 / precision.color,
        },
    }
    text = json.dumps(header).encode()
    raw = b"".join((folded >> shift & 255).astype(np.uint8).tobytes() for shift in (0, 8))
    return MAGIC + len(text).to_bytes(4, "little") + text + zlib.compress(raw, 9)


def _held(
    table: Int[np.ndarray, "T G n"], seen: Bool[np.ndarray, "T G"]
) -> Int[np.ndarray, "T G n"]:
    """Numbers that are not seen become those of the next timestep that is, or else of the last."""
    timesteps = np.arange(len(seen))[:, None]
    after = np.minimum.accumulate(np.where(seen, timesteps, len(seen))[::-1], axis=0)[::-1]
    before = np.maximum.accumulate(np.where(seen, timesteps, 0), axis=0)
    source = np.where(after < len(seen), after, before)
    return np.take_along_axis(table, source[..., None], axis=0)


def _cube_rotations() -> tuple[Float[np.ndarray, "24 4"], Int[np.ndarray, "24 3"]]:
    """Quaternions that rename the axes of a cube, and which axis each of the new ones was."""
    found = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=4)))
    found = found[np.isin(np.abs(found).sum(axis=-1), (1, 2, 4))]
    found = found[[next(x for x in q if x) > 0 for q in found]]  # q and -q are the same
    quats = found / np.linalg.norm(found, axis=-1, keepdims=True)
    w, x, y, z = quats.T
    columns = [  # of the rotation matrices; each has one entry that is not 0
        [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)],
        [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)],
        [2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)],
    ]
    return quats, np.abs(np.array(columns)).argmax(axis=1).T


CUBE_ROTATIONS, CUBE_AXES = _cube_rotations()


def _small_rotations(
    quats: Float[Array, "G 4"], scales: Float[Array, "G 3"]
) -> tuple[Float[np.ndarray, "G 3"], Float[np.ndarray, "G 3"]]:
    """The same ellipsoids with their axes renamed: vector parts of quaternions, and scales."""
    quats, scales = (np.asarray(x, np.float64) for x in (quats, scales))
    quats, scales = unit_quats(quats), np.abs(scales)
    # The real part of q c is the product with c's conjugate: the one nearest to no rotation wins.
    conjugates = CUBE_ROTATIONS * [1, -1, -1, -1]
    best = np.abs(quats @ conjugates.T).argmax(axis=-1)
    w, v = quats[:, :1], quats[:, 1:]
    cw, cv = CUBE_ROTATIONS[best, :1], CUBE_ROTATIONS[best, 1:]
    real = w * cw - np.sum(v * cv, axis=-1, keepdims=True)
    vector = w * cv + cw * v + np.cross(v, cv)
    return np.where(real < 0, -vector, vector), np.take_along_axis(scales, CUBE_AXES[best], axis=-1)
