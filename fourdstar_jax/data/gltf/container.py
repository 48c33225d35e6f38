"""The container of glTF 2.0: chunks of a GLB file, buffers, views and accessors, bounds checked.

Section numbers refer to the glTF 2.0 specification
(https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html).
"""

import base64
import struct
from typing import Any

import numpy as np

from fourdstar_jax import outside

MAX_FILE_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20
MAX_JSON_VALUES = 16_000_000
MAX_VALUES = 64 << 20  # elements of one accessor
MAX_BAD_WEIGHTS = 0.003  # share of skin weights that may be no numbers: a few, as viewers allow
MAX_EMPTY = 2_000_000  # elements of an accessor without data, which costs the file nothing

COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
# Extensions that are read, and those whose absence changes nothing that is drawn.
READ_EXTENSIONS = {
    "EXT_mesh_gpu_instancing",
    "EXT_texture_webp",
    "KHR_materials_emissive_strength",
    "KHR_materials_pbrSpecularGlossiness",
    "KHR_materials_unlit",
    "KHR_mesh_quantization",
    "KHR_node_visibility",
    "KHR_texture_transform",
}
# A file may need these and is drawn without them: they change shading, not shape or base colour.
SKIPPED_EXTENSIONS = {"KHR_lights_punctual", "KHR_animation_pointer", "KHR_xmp_json_ld"}
MAX_ITEMS = {  # entries of the file's lists; nodes are few, accessors may be many
    "nodes": 20_000,
    "scenes": 1_000,
    "meshes": 20_000,
    "skins": 2_000,
    "materials": 10_000,
    "textures": 10_000,
    "images": 10_000,
    "samplers": 10_000,
    "animations": 4_000,
    "accessors": 500_000,
    "bufferViews": 500_000,
    "buffers": 1_000,
    "cameras": 10_000,
}


class MalformedAsset(ValueError):
    """A file that cannot be read, posed or drawn; the message is one line."""


class Container:
    """A file's JSON tree, and arrays of its binary data."""

    def __init__(self, data: bytes):
        self.json, self.binary = _chunks(data)
        version = self.json["asset"]["version"]
        if not str(version).startswith("2."):
            raise MalformedAsset(f"glTF version {version!r}, not 2")
        for kind, most in MAX_ITEMS.items():
            if len(self.json.get(kind, [])) > most:
                raise MalformedAsset(f"{len(self.json[kind])} {kind}, more than {most}")
        skippable = SKIPPED_EXTENSIONS | READ_EXTENSIONS
        for extension in self.json.get("extensionsRequired", []):
            if extension not in skippable and not str(extension).startswith("KHR_materials_"):
                raise MalformedAsset(f"needs the glTF extension {extension}, which is not read")
        used = {str(e) for e in self.json.get("extensionsUsed", [])}
        self.unread_extensions = sorted(used - READ_EXTENSIONS)
        self.buffers = [self._buffer(i, b) for i, b in enumerate(self.json.get("buffers", []))]
        self.read: dict[int, np.ndarray] = {}  # key times are shared by many channels

    def item(self, kind: str, index: int) -> dict[str, Any]:
        """The entry of one of the file's lists, such as its meshes."""
        items = self.json.get(kind, [])
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(items):
            raise MalformedAsset(f"{kind}[{index}] does not exist")
        return items[index]

    def _buffer(self, index: int, buffer: dict) -> bytes:
        uri = buffer.get("uri")
        if uri is None:
            if index != 0 or self.binary is None:
                raise MalformedAsset(f"buffer {index} has no data in the file")
            data = self.binary
        else:
            data = data_uri(uri)
            if data is None:
                raise MalformedAsset(f"buffer {index} lies outside the file")
        if not 0 <= int(buffer["byteLength"]) <= len(data):
            raise MalformedAsset(
                f"buffer {index} says {buffer['byteLength']} bytes, the file holds {len(data)}"
            )
        return data

    def view(self, index: int) -> tuple[bytes, int, int, int | None]:
        """A buffer view's buffer, offset, length and stride, bounds checked."""
        view = self.item("bufferViews", index)
        buffer_index = view["buffer"]
        if not 0 <= buffer_index < len(self.buffers):
            raise MalformedAsset(f"buffers[{buffer_index}] does not exist")
        data = self.buffers[buffer_index]
        offset, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        if offset < 0 or length < 0 or offset + length > len(data):
            raise MalformedAsset(f"buffer view {index} leaves its buffer")
        return data, offset, length, view.get("byteStride")

    def _strided(self, view: int, offset: int, count: int, code: int, width: int, what: str):
        if code not in COMPONENTS:
            raise MalformedAsset(f"{what} has component type {code}")
        data, start, length, stride = self.view(view)
        dtype = np.dtype(COMPONENTS[code])
        stride = width * dtype.itemsize if stride is None else int(stride)
        offset = int(offset)
        last = offset + stride * (count - 1) + width * dtype.itemsize
        if count < 1 or offset < 0 or stride < width * dtype.itemsize or last > length:
            raise MalformedAsset(f"{what} leaves its buffer view")
        return np.ndarray(
            (count, width), dtype, data, start + offset, strides=(stride, dtype.itemsize)
        )

    def accessor(
        self, index: int, kinds: tuple[str, ...], *, raw: bool = False, use: str = ""
    ) -> np.ndarray:
        """Values [count, width], float32 unless `raw`; normalized integers as fractions.

        All are finite, but for a few rows of skin weights (`use` begins so).
        """
        accessor, what = self.item("accessors", index), f"accessor {index}{use and f' ({use})'}"
        kind, count, code = accessor["type"], accessor["count"], accessor["componentType"]
        if kind not in kinds:
            raise MalformedAsset(f"{what} is {kind}, not {' or '.join(kinds)}")
        if not isinstance(count, int) or not 1 <= count <= MAX_VALUES:
            raise MalformedAsset(f"{what} has {count} elements")
        if code not in COMPONENTS:
            raise MalformedAsset(f"{what} has component type {code}")
        width = WIDTHS[kind]
        sparse = accessor.get("sparse")
        if "bufferView" in accessor:
            values = self._strided(
                accessor["bufferView"], accessor.get("byteOffset", 0), count, code, width, what
            )
        else:
            if count > MAX_EMPTY:
                raise MalformedAsset(f"{what} has {count} elements and no data")
            values = np.zeros((count, width), COMPONENTS[code])
        if sparse is not None:
            values = values.copy()
            n, where, new = sparse["count"], sparse["indices"], sparse["values"]
            if where["componentType"] not in (5121, 5123, 5125):
                raise MalformedAsset(f"{what} has sparse indices that are not unsigned integers")
            rows = self._strided(
                where["bufferView"],
                where.get("byteOffset", 0),
                n,
                where["componentType"],
                1,
                f"{what}'s sparse indices",
            )[:, 0].astype(np.int64)
            if rows.max() >= count or (np.diff(rows) <= 0).any():
                raise MalformedAsset(f"{what} has sparse indices out of order or range")
            values[rows] = self._strided(
                new["bufferView"], new.get("byteOffset", 0), n, code, width, f"{what}'s values"
            )
        if raw:
            return values
        if index in self.read:
            return self.read[index]
        out = values.astype(np.float32)
        if accessor.get("normalized", False) and code != 5126:
            limit = np.iinfo(COMPONENTS[code]).max
            out = np.maximum(out / limit, -1.0)
        bad = int((~np.isfinite(out)).any(axis=1).sum())
        if bad and use.startswith("WEIGHTS") and bad <= MAX_BAD_WEIGHTS * count:
            return out
        if bad:
            raise MalformedAsset(f"{what} is not finite in {bad} of {count} rows")
        self.read[index] = out
        return out


def _chunks(data: bytes) -> tuple[dict, bytes | None]:
    """The JSON and binary chunks (4.4)."""
    if len(data) > MAX_FILE_BYTES:
        raise MalformedAsset(f"larger than {MAX_FILE_BYTES >> 20} MB")
    if len(data) < 20 or data[:4] != b"glTF":
        raise MalformedAsset("not a GLB file (its first bytes are not 'glTF')")
    version, total = struct.unpack_from("<II", data, 4)
    if version != 2:
        raise MalformedAsset(f"GLB version {version}, not 2")
    if total > len(data):
        raise MalformedAsset(f"cut short: {len(data)} of {total} bytes")
    found, offset = {}, 12
    while offset + 8 <= total:
        length, kind = struct.unpack_from("<I4s", data, offset)
        if offset + 8 + length > total:
            raise MalformedAsset(f"a chunk of {length} bytes leaves the file")
        found.setdefault(kind, data[offset + 8 : offset + 8 + length])
        offset += 8 + length
    if b"JSON" not in found:
        raise MalformedAsset("no JSON chunk")
    try:
        tree = outside.parse(
            found[b"JSON"],
            "the JSON chunk",
            max_bytes=MAX_JSON_BYTES,
            max_values=MAX_JSON_VALUES,
            lenient=True,
        )
    except ValueError as error:
        raise MalformedAsset(str(error)) from error
    if not isinstance(tree, dict):
        raise MalformedAsset("the JSON chunk is not an object")
    return tree, found.get(b"BIN\0")


def data_uri(uri: str) -> bytes | None:
    """The bytes of a base64 data URI; None for any other address, which is never opened."""
    head, comma, body = uri.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        return None
    return base64.b64decode(body, validate=True)
