"""One timestep of Gaussians in the files that viewers and engines read, besides PLY.

Nothing is pruned or sorted: Gaussian g stays in place g, in every timestep's file. Which way is up
is each format's own rule: `.splat` and `compressed.ply` lie as PLY does (`ply.AXES`), `.spz` and
glTF have y up as in memory.
"""

import gzip
import json
import struct

import numpy as np
from jaxtyping import Float, UInt32

from fourdstar_jax.export.ply import MIN_SCALE, SH_C0, half_turn, unit_quats
from fourdstar_jax.types import Gaussians

CHUNK = 256  # Gaussians of compressed.ply that share their bounds
SPZ_BITS = 12  # of a position behind the point, where the positions allow it
GLTF = "KHR_gaussian_splatting"


def splat(gaussians: Gaussians) -> bytes:
    """`.splat` (antimatter15): 32 bytes each, positions and scales as floats, the rest as bytes."""
    means, quats, scales, opacities, colors = _arrays(gaussians)
    means, quats = half_turn(means, quats)
    row = np.dtype([("floats", "<f4", 6), ("rgba", "u1", 4), ("rotation", "u1", 4)])
    rows = np.empty(len(means), row)
    rows["floats"] = np.concatenate([means, scales], axis=-1)
    rows["rgba"] = _bytes(255 * np.concatenate([colors, opacities[:, None]], axis=-1))
    rows["rotation"] = _bytes(128 + 128 * quats)
    return rows.tobytes()


def spz(gaussians: Gaussians) -> bytes:
    """`.spz` (Niantic), version 3: a gzip file of one attribute after the other.

    Raises ValueError for positions beyond 2^22.
    """
    means, quats, scales, opacities, colors = _arrays(gaussians)
    largest = np.abs(means).max(initial=1e-9)
    bits = min(SPZ_BITS, 22 - int(np.ceil(np.log2(largest))))
    if bits < 0:
        raise ValueError(f"a position of {largest:g} does not fit an spz file")
    places = np.rint(means * 2.0**bits).astype("<i4")
    places = places.view(np.uint8).reshape(-1, 3, 4)[..., :3]  # 24 bits of each
    parts = [
        struct.pack("<4sIIBBBB", b"NGSP", 3, len(means), 0, bits, 0, 0),
        places.tobytes(),
        _bytes(255 * opacities).tobytes(),
        _bytes(255 * (0.15 * (colors - 0.5) / SH_C0 + 0.5)).tobytes(),
        _bytes(16 * (np.log(np.maximum(scales, MIN_SCALE)) + 10)).tobytes(),
        _spz_rotations(quats).astype("<u4").tobytes(),
    ]
    return gzip.compress(b"".join(parts), mtime=0)


def compressed_ply(gaussians: Gaussians) -> bytes:
    """`compressed.ply` (PlayCanvas): 16 bytes each, within bounds of every 256."""
    means, quats, scales, opacities, colors = _arrays(gaussians)
    means, quats = half_turn(means, quats)
    logs = np.clip(np.log(np.maximum(scales, MIN_SCALE)), -20, 20)
    bounds, packed = [], []
    for start in range(0, len(means), CHUNK):
        part = slice(start, start + CHUNK)
        rows = [(means, (11, 10, 11)), (logs, (11, 10, 11)), (colors, (8, 8, 8))]
        words = []
        for values, bits in rows:
            low, high = values[part].min(axis=0), values[part].max(axis=0)
            low, high = low.astype("<f4"), high.astype("<f4")
            bounds.append(np.concatenate([low, high]))
            unit = (values[part] - low) / np.where(high > low, high - low, 1)
            words.append(_packed(unit, bits))
        rgba = words[2] << np.uint32(8) | _bytes(255 * opacities[part]).astype(np.uint32)
        rotation = _smallest_three(quats[part])
        packed.append(np.stack([words[0], rotation, words[1], rgba], axis=-1))
    names = [
        f"{end}_{kind}{axis}"
        for kind, axes in (("", "xyz"), ("scale_", "xyz"), ("", "rgb"))
        for end in ("min", "max")
        for axis in axes
    ]
    header = ["ply", "format binary_little_endian 1.0", f"element chunk {len(bounds) // 3}"]
    header += [f"property float {name}" for name in names]
    header += [f"element vertex {len(means)}"]
    header += [f"property uint packed_{x}" for x in ("position", "rotation", "scale", "color")]
    data = np.concatenate(bounds).astype("<f4").tobytes()
    data += np.concatenate(packed).astype("<u4").tobytes()
    return "\n".join([*header, "end_header", ""]).encode() + data


def glb(gaussians: Gaussians) -> bytes:
    """Binary glTF with KHR_gaussian_splatting; other readers see a cloud of coloured points."""
    means, quats, scales, opacities, colors = _arrays(gaussians)
    attributes = {
        "POSITION": means,
        "COLOR_0": _bytes(255 * np.concatenate([colors, opacities[:, None]], axis=-1)),
        f"{GLTF}:ROTATION": quats[:, [1, 2, 3, 0]],  # glTF says xyzw
        f"{GLTF}:SCALE": scales,
        f"{GLTF}:OPACITY": opacities[:, None],
        f"{GLTF}:SH_DEGREE_0_COEF_0": (colors - 0.5) / SH_C0,
    }
    binary, views, accessors = b"", [], []
    for name, values in attributes.items():
        floats = values.dtype != np.uint8
        data = values.astype("<f4").tobytes() if floats else values.tobytes()
        views.append({"buffer": 0, "byteOffset": len(binary), "byteLength": len(data)})
        views[-1]["target"] = 34962  # ARRAY_BUFFER
        accessor = {
            "bufferView": len(accessors),
            "componentType": 5126 if floats else 5121,
            "count": len(values),
            "type": {1: "SCALAR", 3: "VEC3", 4: "VEC4"}[values.shape[1]],
        }
        if not floats:
            accessor["normalized"] = True
        if name == "POSITION":
            box = (values.astype("<f4").min(axis=0), values.astype("<f4").max(axis=0))
            accessor |= {"min": box[0].tolist(), "max": box[1].tolist()}
        accessors.append(accessor)
        binary += data
    primitive = {
        "mode": 0,  # POINTS
        "attributes": {name: i for i, name in enumerate(attributes)},
        "extensions": {
            GLTF: {
                "kernel": "ellipse",
                "colorSpace": "srgb_rec709_display",
                "projection": "perspective",
                "sortingMethod": "cameraDistance",
            }
        },
    }
    document = {
        "asset": {"version": "2.0", "generator": "fourdstar_jax"},
        "extensionsUsed": [GLTF],
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [primitive]}],
        "buffers": [{"byteLength": len(binary)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    total = 12 + 8 + len(text) + 8 + len(binary)  # every attribute fills whole words
    head = struct.pack("<4sII", b"glTF", 2, total)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    return head + chunks + struct.pack("<I4s", len(binary), b"BIN\0") + binary


def _arrays(gaussians: Gaussians) -> tuple[Float[np.ndarray, "G ..."], ...]:
    """The arrays of one timestep, float64, quaternions normalised. Checks them."""
    means, quats, scales, opacities, colors = (np.asarray(x, np.float64) for x in gaussians)
    if means.ndim != 2 or len(means) == 0:
        raise ValueError(f"{means.shape=} must be [G, 3]: one file holds one timestep")
    if not all(np.isfinite(x).all() for x in (means, quats, scales, opacities, colors)):
        raise ValueError("gaussians hold values that are not finite")
    return (
        means,
        unit_quats(quats),
        np.abs(scales),
        np.clip(opacities, 0, 1),
        np.clip(colors, 0, 1),
    )


def _bytes(values: Float[np.ndarray, "..."]) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _packed(unit: Float[np.ndarray, "G n"], bits: tuple[int, ...]) -> UInt32[np.ndarray, " G"]:
    """Numbers of 0 .. 1 in one word, the first ones in the highest bits."""
    word = np.zeros(len(unit), np.uint32)
    for values, width in zip(unit.T, bits, strict=True):
        whole = np.rint(np.clip(values, 0, 1) * (2**width - 1)).astype(np.uint32)
        word = word << np.uint32(width) | whole
    return word


def _three_others(
    quats: Float[np.ndarray, "G 4"],
) -> tuple[UInt32[np.ndarray, " G"], Float[np.ndarray, "G 3"]]:
    """Which component is the largest, and the other three of that quaternion where it is positive.

    In units of their largest value, the root of a half.
    """
    largest = np.abs(quats).argmax(axis=-1)
    sign = np.where(np.take_along_axis(quats, largest[:, None], axis=-1) < 0, -1, 1)
    others = quats[np.arange(4) != largest[:, None]].reshape(-1, 3)
    return largest.astype(np.uint32), others * sign * np.sqrt(2)


def _smallest_three(quats: Float[np.ndarray, "G 4"]) -> UInt32[np.ndarray, " G"]:
    """Two bits for which of w x y z is left out, ten for each of the others."""
    largest, others = _three_others(quats)
    return largest << np.uint32(30) | _packed(0.5 + 0.5 * others, (10, 10, 10))


def _spz_rotations(quats: Float[np.ndarray, "G 4"]) -> UInt32[np.ndarray, " G"]:
    """Two bits for which of x y z w is left out, a sign and nine bits for each of the others."""
    largest, others = _three_others(quats[:, [1, 2, 3, 0]])
    sizes = np.rint(511 * np.minimum(np.abs(others), 1)).astype(np.uint32)
    word = largest
    for size, negative in zip(sizes.T, (others < 0).T, strict=True):
        word = word << np.uint32(10) | negative.astype(np.uint32) << np.uint32(9) | size
    return word
