"""A small writer of GLB files, and boxes made with it."""

import json
import struct

import numpy as np

CODES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
KINDS = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


class GlbWriter:
    """Collects accessors in one binary chunk; `tree` is the JSON that goes with them."""

    def __init__(self):
        self.binary = b""
        self.tree = {
            "asset": {"version": "2.0"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": [],
            "meshes": [],
            "accessors": [],
            "bufferViews": [],
        }

    def view(self, data: bytes) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        self.tree["bufferViews"].append(
            {"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)}
        )
        self.binary += data
        return len(self.tree["bufferViews"]) - 1

    def accessor(self, values, dtype="f4", **more) -> int:
        values = np.asarray(values, "<" + dtype)
        width = 1 if values.ndim == 1 else int(np.prod(values.shape[1:]))
        self.tree["accessors"].append(
            {
                "bufferView": self.view(values.tobytes()),
                "componentType": CODES[dtype],
                "count": len(values),
                "type": KINDS[width],
                **more,
            }
        )
        return len(self.tree["accessors"]) - 1

    def sampler(self, times, values, interpolation="LINEAR") -> dict:
        return {
            "input": self.accessor(times),
            "output": self.accessor(values),
            "interpolation": interpolation,
        }

    def animate(self, name, *channels) -> None:
        """channels: (node, path, times, values, interpolation)."""
        made = [self.sampler(*channel[2:]) for channel in channels]
        targets = [{"node": c[0], "path": c[1]} for c in channels]
        self.tree.setdefault("animations", []).append(
            {
                "name": name,
                "samplers": made,
                "channels": [{"sampler": i, "target": t} for i, t in enumerate(targets)],
            }
        )

    def bytes(self) -> bytes:
        self.tree["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(self.tree).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        total = 12 + 8 + len(text) + 8 + len(binary)
        return (
            struct.pack("<4sII", b"glTF", 2, total)
            + struct.pack("<I4s", len(text), b"JSON")
            + text
            + struct.pack("<I4s", len(binary), b"BIN\0")
            + binary
        )


def box(size=(1.0, 1.0, 1.0), center=(0.0, 0.0, 0.0)):
    """Corners [8, 3] and triangles [12, 3] of a box."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    triangles = [t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))]
    return signs * np.array(size) / 2 + np.array(center), np.array(triangles)


def box_writer(size=(1.0, 1.0, 1.0), color=(1.0, 0.0, 0.0, 1.0), **attributes) -> GlbWriter:
    """One coloured box under node 0."""
    w = GlbWriter()
    corners, triangles = box(size)
    w.tree["materials"] = [{"pbrMetallicRoughness": {"baseColorFactor": list(color)}}]
    primitive = {
        "attributes": {"POSITION": w.accessor(corners), **attributes},
        "indices": w.accessor(triangles.ravel(), "u2"),
        "material": 0,
    }
    w.tree["meshes"] = [{"primitives": [primitive]}]
    w.tree["nodes"] = [{"mesh": 0, "name": "body"}]
    return w


def moving_box(distance=1.0, duration_s=1.0, name="Armature|Slide_Right", **box_options) -> bytes:
    w = box_writer(**box_options)
    w.animate(name, (0, "translation", [0, duration_s], [[0, 0, 0], [distance, 0, 0]]))
    return w.bytes()
