"""Reads and poses animated GLB files (glTF 2.0 binary) with numpy and json alone.

Files come from anywhere, so every length, index and offset is checked before use, nothing outside
the file is opened (external URIs), and sizes are capped. What cannot be read raises
`MalformedAsset` with one line that says why. Section numbers refer to the glTF 2.0 specification
(https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html).

What is drawn: triangles of the default scene, with vertex colours, base colours, base colour
textures and emission; node transforms, skins (any number of joint sets) and morph targets, moved
by any clip of the file (STEP, LINEAR, CUBICSPLINE). Cameras, lights and materials' other maps are
left aside.
"""

import base64
import hashlib
import io
import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

MAX_FILE_BYTES = 256 << 20
MAX_JSON_BYTES = 64 << 20
MAX_NODES = 20_000
MAX_VERTICES = 2_000_000  # after instancing: a mesh under ten nodes counts ten times
MAX_TRIANGLES = 4_000_000
MAX_KEY_VALUES = 64 << 20  # numbers in all animation samplers together
MAX_MORPH_VALUES = 64 << 20
MAX_TEXTURES = 64
MAX_TEXTURE_PIXELS = 4096 * 4096
DRAWN_TEXTURE_SIDE = 1024  # larger textures are reduced when read

_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
_KNOWN_EXTENSIONS = {"KHR_texture_transform", "KHR_mesh_quantization", "KHR_lights_punctual"}
_PATHS = ("translation", "rotation", "scale", "weights")


class MalformedAsset(ValueError):
    """A file that cannot be read, posed or drawn; the message is one line."""


@dataclass(frozen=True)
class Clip:
    """One animation of a file."""

    index: int
    name: str
    start_s: float  # first key of all channels
    duration_s: float  # last key minus first


@dataclass(frozen=True)
class Draw:
    """A run of triangles that share a texture."""

    first: int  # triangle
    count: int
    texture: int  # index into `Asset.textures`, -1 for none
    alpha_cutoff: float  # fragments below it are not drawn


class Posed(NamedTuple):
    """Vertices at some times, world frame."""

    positions: Float32[np.ndarray, "T P 3"]
    normals: Float32[np.ndarray, "T P 3"] | None  # not unit length; zero where the file has none


@dataclass
class _Node:
    children: list[int]
    mesh: int | None
    skin: int | None
    matrix: np.ndarray | None  # [4, 4]
    translation: np.ndarray
    rotation: np.ndarray  # xyzw, as in the file
    scale: np.ndarray
    weights: np.ndarray | None
    name: str


@dataclass
class _Channel:
    node: int
    path: str
    interpolation: str
    times: np.ndarray  # [S] seconds
    values: np.ndarray  # [S, C], or [S, 3, C] (in-tangent, value, out-tangent) for CUBICSPLINE


@dataclass
class _Part:
    """One primitive under one node: a range of the asset's vertices and what moves it."""

    first: int
    count: int
    bones: np.ndarray  # [J] node of each bone; the node itself when the mesh has no skin
    inverse_bind: np.ndarray  # [J, 4, 4]
    joints: np.ndarray  # [P, S] into bones
    weights: np.ndarray  # [P, S], sums to one
    node: int
    morph_positions: np.ndarray | None  # [M, P, 3]
    morph_normals: np.ndarray | None
    morph_weights: np.ndarray  # [M] at rest


@dataclass
class Asset:
    """A GLB file in memory. Vertices of all primitives are concatenated."""

    name: str
    sha256: str
    positions: Float32[np.ndarray, "P 3"]  # as in the file, before skin and node transforms
    normals: Float32[np.ndarray, "P 3"]
    uvs: Float32[np.ndarray, "P 2"]
    colors: Float32[np.ndarray, "P 4"]  # vertex colour times base colour, linear RGBA
    emission: Float32[np.ndarray, "P 3"]  # linear RGB
    triangles: Int32[np.ndarray, "F 3"]
    draws: list[Draw]
    textures: list[UInt8[np.ndarray, "h w 4"]]  # sRGB, straight alpha, row 0 at v = 0
    clips: list[Clip]
    warnings: list[str]
    _nodes: list[_Node] = field(repr=False)
    _order: list[tuple[int, int]] = field(repr=False)  # (node, parent or -1), parents first
    _parts: list[_Part] = field(repr=False)
    _channels: list[list[_Channel]] = field(repr=False)  # one list a clip
    joint_names: frozenset[str] = frozenset()  # of the skins; moved nodes when there is no skin

    def pose(
        self,
        clip: int | None,
        times_s: Float[np.ndarray, " T"],
        *,
        normals: bool = True,
    ) -> Posed:
        """Vertices at `times_s` seconds after the clip's first key; None is the rest pose."""
        times_s = np.asarray(times_s, np.float64)
        if clip is not None and not 0 <= clip < len(self.clips):
            raise ValueError(f"{clip=} is not one of the {len(self.clips)} clips of {self.name}")
        channels = [] if clip is None else self._channels[clip]
        start = 0.0 if clip is None else self.clips[clip].start_s
        world, morphs = self._animate(channels, times_s + start)
        T = len(times_s)
        out = np.empty((T, len(self.positions), 3), np.float32)
        out_normals = np.empty_like(out) if normals else None
        for part in self._parts:
            bones = (world[:, part.bones] @ part.inverse_bind).astype(np.float32)  # [T, J, 4, 4]
            flat = np.moveaxis(bones[:, :, :3], 0, 1).reshape(len(part.bones), -1)  # [J, T*3*4]
            weight = morphs.get(part.node, part.morph_weights[None])
            step = max(64, (1 << 22) // max(1, flat.shape[1]))  # bounds the blend's memory
            for lo in range(0, part.count, step):
                hi = min(part.count, lo + step)
                span = slice(part.first + lo, part.first + hi)
                dense = np.zeros((hi - lo, len(part.bones)), np.float32)
                rows = np.arange(hi - lo)
                for s in range(part.joints.shape[1]):
                    dense[rows, part.joints[lo:hi, s]] += part.weights[lo:hi, s]
                blend = (dense @ flat).reshape(hi - lo, T, 3, 4)
                rotate = blend[..., :3]

                def morphed(base, deltas, lo=lo, hi=hi, weight=weight):
                    if deltas is None:
                        return base[None]
                    return base + np.einsum("tm,mpk->tpk", weight, deltas[:, lo:hi])

                points = morphed(self.positions[span], part.morph_positions)
                moved = np.einsum("ptij,tpj->tpi", rotate, np.broadcast_to(points, (T, hi - lo, 3)))
                out[:, span] = moved + np.moveaxis(blend[..., 3], 0, 1)
                if out_normals is not None:
                    n = morphed(self.normals[span], part.morph_normals)
                    n = np.broadcast_to(n, (T, hi - lo, 3))
                    out_normals[:, span] = np.einsum("ptij,tpj->tpi", rotate, n)
        if not np.isfinite(out).all():
            where = "the rest pose" if clip is None else f"clip {self.clips[clip].name!r}"
            raise MalformedAsset(f"{where} has vertices that are not finite")
        return Posed(out, out_normals)

    def local_rotations(
        self, clip: int, times_s: Float[np.ndarray, " T"]
    ) -> Float[np.ndarray, "T J 4"]:
        """Unit rotations xyzw of the joints against their parents, joints in order of name."""
        times = np.asarray(times_s, np.float64) + self.clips[clip].start_s
        names = sorted(self.joint_names)
        rest = {node.name: node.rotation for node in self._nodes}
        turns = np.stack([np.broadcast_to(rest[n], (len(times), 4)) for n in names], axis=1).copy()
        for channel in self._channels[clip]:
            name = self._nodes[channel.node].name
            if channel.path == "rotation" and name in self.joint_names:
                turns[:, names.index(name)] = _sample(channel, times)
        return turns / np.maximum(np.linalg.norm(turns, axis=-1, keepdims=True), 1e-12)

    def _animate(self, channels: list[_Channel], times: np.ndarray):
        """World matrices [T, nodes, 4, 4] and the morph weights [T, M] of the nodes that have."""
        T, count = len(times), len(self._nodes)
        local = np.broadcast_to(np.eye(4), (T, count, 4, 4)).copy()
        trs = {}
        morphs = {}
        for channel in channels:
            value = _sample(channel, times)
            if channel.path == "weights":
                morphs[channel.node] = value
            else:
                trs.setdefault(channel.node, {})[channel.path] = value
        for i, node in enumerate(self._nodes):
            if i in trs:
                moved = trs[i]
                local[:, i] = _compose(
                    moved.get("translation", node.translation),
                    moved.get("rotation", node.rotation),
                    moved.get("scale", node.scale),
                    T,
                )
            elif node.matrix is not None:
                local[:, i] = node.matrix
        world = np.empty_like(local)
        for i, parent in self._order:
            world[:, i] = local[:, i] if parent < 0 else world[:, parent] @ local[:, i]
        return world, morphs


def load(source: str | Path | bytes, *, name: str | None = None) -> Asset:
    """Reads a GLB file (or its bytes). Raises `MalformedAsset`; a missing file is an OSError."""
    if isinstance(source, bytes):
        data, name = source, name or "bytes"
    else:
        path = Path(source)
        name = name or path.name
        if path.stat().st_size > MAX_FILE_BYTES:
            raise MalformedAsset(f"larger than {MAX_FILE_BYTES >> 20} MB")
        data = path.read_bytes()
    try:
        return _Reader(data, name).asset()
    except MalformedAsset:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as error:  # JSON of the wrong shape: fields missing, of another type, out of range
        kind = "missing field" if isinstance(error, KeyError) else type(error).__name__
        reason = str(error).splitlines()[0] if str(error) else "no details"
        raise MalformedAsset(f"not valid glTF ({kind}: {reason})") from error


class _Reader:
    """Turns the bytes of a file into an Asset."""

    def __init__(self, data: bytes, name: str):
        self.name, self.sha256 = name, hashlib.sha256(data).hexdigest()
        self.json, self.binary = _chunks(data)
        self.warnings: list[str] = []
        version = self.json["asset"]["version"]
        if not str(version).startswith("2."):
            raise MalformedAsset(f"glTF version {version!r}, not 2")
        for extension in self.json.get("extensionsRequired", []):
            known = extension in _KNOWN_EXTENSIONS or str(extension).startswith("KHR_materials_")
            if not known:
                raise MalformedAsset(f"needs the glTF extension {extension}, which is not read")
        self.buffers = [self._buffer(i, b) for i, b in enumerate(self.json.get("buffers", []))]
        self.textures: list[np.ndarray] = []
        self.texture_of_image: dict[int, int] = {}
        self.read: dict[int, np.ndarray] = {}  # key times are shared by many channels

    def asset(self) -> Asset:
        nodes = [self._node(n) for n in self.json.get("nodes", [])]
        order = self._order(nodes)
        parts, chunks, draws = [], [], []
        num_vertices = num_triangles = 0
        for i, _ in order:
            mesh = nodes[i].mesh
            if mesh is None:
                continue
            for primitive in self._get("meshes", mesh)["primitives"]:
                arrays, part, draw = self._primitive(primitive, mesh, i, nodes[i], len(nodes))
                if len(arrays["triangles"]) == 0:
                    continue
                part.first = num_vertices
                arrays["triangles"] = arrays["triangles"] + num_vertices
                num_vertices += part.count
                draws.append(replace(draw, first=num_triangles, count=len(arrays["triangles"])))
                num_triangles += len(arrays["triangles"])
                if num_vertices > MAX_VERTICES or num_triangles > MAX_TRIANGLES:
                    raise MalformedAsset(
                        f"more than {MAX_VERTICES:,} vertices or {MAX_TRIANGLES:,} triangles"
                    )
                parts.append(part)
                chunks.append(arrays)
        if not parts:
            raise MalformedAsset("no triangles in the default scene")
        joined: dict[str, Any] = {
            key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]
        }
        clips, channels = self._clips(nodes)
        skins = self.json.get("skins", [])
        if skins:
            joints = {nodes[j].name for skin in skins for j in skin["joints"]}
        else:
            joints = {nodes[c.node].name for clip in channels for c in clip}
        return Asset(
            name=self.name,
            sha256=self.sha256,
            draws=_merge_draws(draws, joined),
            textures=self.textures,
            clips=clips,
            warnings=self.warnings,
            joint_names=frozenset(joints),
            _nodes=nodes,
            _order=order,
            _parts=parts,
            _channels=channels,
            **joined,
        )

    def _get(self, kind: str, index: int) -> dict:
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
            data = _data_uri(uri)
            if data is None:
                raise MalformedAsset(f"buffer {index} lies outside the file")
        if not 0 <= int(buffer["byteLength"]) <= len(data):
            raise MalformedAsset(
                f"buffer {index} says {buffer['byteLength']} bytes, the file holds {len(data)}"
            )
        return data

    def _view(self, index: int) -> tuple[bytes, int, int, int | None]:
        """A buffer view's buffer, offset, length and stride, bounds checked."""
        view = self._get("bufferViews", index)
        buffer_index = view["buffer"]
        if not 0 <= buffer_index < len(self.buffers):
            raise MalformedAsset(f"buffers[{buffer_index}] does not exist")
        data = self.buffers[buffer_index]
        offset, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        if offset < 0 or length < 0 or offset + length > len(data):
            raise MalformedAsset(f"buffer view {index} leaves its buffer")
        return data, offset, length, view.get("byteStride")

    def _strided(self, view: int, offset: int, count: int, code: int, width: int, what: str):
        if code not in _COMPONENTS:
            raise MalformedAsset(f"{what} has component type {code}")
        data, start, length, stride = self._view(view)
        dtype = np.dtype(_COMPONENTS[code])
        stride = width * dtype.itemsize if stride is None else int(stride)
        offset = int(offset)
        last = offset + stride * (count - 1) + width * dtype.itemsize
        if count < 1 or offset < 0 or stride < width * dtype.itemsize or last > length:
            raise MalformedAsset(f"{what} leaves its buffer view")
        return np.ndarray(
            (count, width), dtype, data, start + offset, strides=(stride, dtype.itemsize)
        )

    def _accessor(
        self, index: int, kinds: tuple[str, ...], *, raw: bool = False, use: str = ""
    ) -> np.ndarray:
        """[count, width], float32 unless `raw`; normalized integers are fractions (3.6.2)."""
        accessor, what = self._get("accessors", index), f"accessor {index}{use and f' ({use})'}"
        kind, count, code = accessor["type"], accessor["count"], accessor["componentType"]
        if kind not in kinds:
            raise MalformedAsset(f"{what} is {kind}, not {' or '.join(kinds)}")
        if not isinstance(count, int) or not 1 <= count <= MAX_KEY_VALUES:
            raise MalformedAsset(f"{what} has {count} elements")
        if code not in _COMPONENTS:
            raise MalformedAsset(f"{what} has component type {code}")
        width = _WIDTHS[kind]
        sparse = accessor.get("sparse")
        if "bufferView" in accessor:
            values = self._strided(
                accessor["bufferView"], accessor.get("byteOffset", 0), count, code, width, what
            )
        else:
            if count > MAX_VERTICES:  # zeros cost the file nothing
                raise MalformedAsset(f"{what} has {count} elements and no data")
            values = np.zeros((count, width), _COMPONENTS[code])
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
            limit = np.iinfo(_COMPONENTS[code]).max
            out = np.maximum(out / limit, -1.0)
        bad = int((~np.isfinite(out)).any(axis=1).sum())
        if bad:
            raise MalformedAsset(f"{what} is not finite in {bad} of {count} rows")
        self.read[index] = out
        return out

    def _node(self, node: dict) -> _Node:
        def vector(key, default):
            value = np.asarray(node.get(key, default), np.float64)
            if value.shape != (len(default),) or not np.isfinite(value).all():
                raise MalformedAsset(f"a node's {key} is not {len(default)} finite numbers")
            return value

        trs = (
            vector("translation", [0.0, 0, 0]),
            vector("rotation", [0.0, 0, 0, 1]),
            vector("scale", [1.0, 1, 1]),
        )
        if "matrix" in node:
            matrix = vector("matrix", list(np.eye(4).ravel())).reshape(4, 4).T
        else:
            matrix = _compose(*trs, 1)[0]
        weights = node.get("weights")
        return _Node(
            children=[int(c) for c in node.get("children", [])],
            mesh=node.get("mesh"),
            skin=node.get("skin"),
            matrix=matrix,
            translation=trs[0],
            rotation=trs[1],
            scale=trs[2],
            weights=None if weights is None else np.asarray(weights, np.float32),
            name=str(node.get("name", "")),
        )

    def _order(self, nodes: list[_Node]) -> list[tuple[int, int]]:
        """(node, parent) of the default scene, parents first; a node has one parent (3.5.2)."""
        if len(nodes) > MAX_NODES:
            raise MalformedAsset(f"{len(nodes)} nodes, more than {MAX_NODES}")
        scenes = self.json.get("scenes", [])
        children = {c for n in nodes for c in n.children}
        if scenes:
            roots = self._get("scenes", self.json.get("scene", 0)).get("nodes", [])
        else:
            roots = [i for i in range(len(nodes)) if i not in children]
        # Joints may hang outside the scene (Blender does not do so, others do): their roots
        # are posed too, but their meshes are not drawn; see below.
        seen, order = set(), []
        stack = [(r, -1) for r in reversed(roots)]
        while stack:
            i, parent = stack.pop()
            if not isinstance(i, int) or not 0 <= i < len(nodes):
                raise MalformedAsset(f"nodes[{i}] does not exist")
            if i in seen:
                raise MalformedAsset(f"node {i} has two parents or is its own ancestor")
            seen.add(i)
            order.append((i, parent))
            stack.extend((c, i) for c in reversed(nodes[i].children))
        outside = [i for i in range(len(nodes)) if i not in seen]
        stack = [(i, -1) for i in outside if i not in children]
        while stack:
            i, parent = stack.pop()
            if not 0 <= i < len(nodes) or i in seen:
                raise MalformedAsset(f"node {i} has two parents or does not exist")
            seen.add(i)
            nodes[i].mesh = None
            order.append((i, parent))
            stack.extend((c, i) for c in nodes[i].children)
        if len(seen) != len(nodes):
            raise MalformedAsset("the nodes form a ring")
        return order

    def _primitive(self, primitive: dict, mesh: int, node_index: int, node: _Node, count: int):
        attributes = primitive["attributes"]
        positions = self._accessor(attributes["POSITION"], ("VEC3",), use="POSITION")
        P = len(positions)
        if P > MAX_VERTICES:
            raise MalformedAsset(f"more than {MAX_VERTICES:,} vertices")

        def attribute(key, kinds):
            if key not in attributes:
                return None
            values = self._accessor(attributes[key], kinds, use=key)
            if len(values) != P:
                raise MalformedAsset(f"{key} has {len(values)} values for {P} vertices")
            return values

        triangles = self._triangles(primitive, P)
        material = self._material(primitive.get("material"))
        colors = np.broadcast_to(material["factor"], (P, 4)).astype(np.float32)
        vertex_color = attribute("COLOR_0", ("VEC3", "VEC4"))
        if vertex_color is not None:
            colors[:, : vertex_color.shape[1]] *= np.clip(vertex_color, 0, 1)
        uvs = attribute(f"TEXCOORD_{material['texcoord']}", ("VEC2",))
        if material["texture"] >= 0 and uvs is None:
            material["texture"] = -1
        uvs = np.zeros((P, 2), np.float32) if uvs is None else uvs
        normals = attribute("NORMAL", ("VEC3",))
        arrays = {
            "positions": positions,
            "normals": np.zeros((P, 3), np.float32) if normals is None else normals,
            "uvs": (uvs @ material["uv"][:2, :2].T + material["uv"][:2, 2]).astype(np.float32),
            "colors": colors,
            "emission": np.broadcast_to(material["emission"], (P, 3)).astype(np.float32),
            "triangles": triangles,
        }
        joints, weights, bones, inverse_bind = self._skin(
            attribute, attributes, node, node_index, P, count
        )
        morph_positions, morph_normals, rest = self._morphs(primitive, mesh, node, P)
        part = _Part(
            0,
            P,
            bones,
            inverse_bind,
            joints,
            weights,
            node_index,
            morph_positions,
            morph_normals if normals is not None else None,
            rest,
        )
        return arrays, part, Draw(0, 0, material["texture"], material["cutoff"])

    def _triangles(self, primitive: dict, P: int) -> np.ndarray:
        """[F, 3]; points and lines are not drawn, strips and fans are unrolled (3.7.2.1)."""
        if "indices" in primitive:
            index = self._accessor(primitive["indices"], ("SCALAR",), raw=True)[:, 0]
            if index.dtype.kind != "u":
                raise MalformedAsset("triangle indices that are not unsigned integers")
            index = index.astype(np.int64)
            if index.max() >= P:
                raise MalformedAsset(f"a triangle names vertex {index.max()} of {P}")
        else:
            index = np.arange(P)
        match primitive.get("mode", 4):
            case 4:
                triangles = index[: len(index) // 3 * 3].reshape(-1, 3)
            case 5:
                triangles = np.stack([index[:-2], index[1:-1], index[2:]], -1)
            case 6:
                triangles = np.stack(
                    [np.broadcast_to(index[:1], index[2:].shape), index[1:-1], index[2:]], -1
                )
            case 0 | 1 | 2 | 3:
                triangles = np.zeros((0, 3))
            case mode:
                raise MalformedAsset(f"a primitive has mode {mode}")
        return triangles.astype(np.int32)

    def _skin(self, attribute, attributes, node: _Node, node_index: int, P: int, count: int):
        rigid = (
            np.zeros((P, 1), np.int64),
            np.ones((P, 1), np.float32),
            np.array([node_index]),
            np.eye(4)[None],
        )
        if node.skin is None or "JOINTS_0" not in attributes:
            return rigid
        skin = self._get("skins", node.skin)
        bones = np.asarray(skin["joints"], np.int64)
        if not len(bones) or bones.min() < 0 or bones.max() >= count:
            raise MalformedAsset(f"skin {node.skin} names a joint that does not exist")
        if "inverseBindMatrices" in skin:
            flat = self._accessor(skin["inverseBindMatrices"], ("MAT4",))
            if len(flat) < len(bones):
                raise MalformedAsset(f"skin {node.skin} has {len(flat)} matrices for its joints")
            inverse_bind = flat[: len(bones)].reshape(-1, 4, 4).transpose(0, 2, 1).astype(float)
        else:
            inverse_bind = np.broadcast_to(np.eye(4), (len(bones), 4, 4))
        sets = [i for i in range(8) if f"JOINTS_{i}" in attributes]
        # Joint numbers ought to be integers; some exporters write them as floats.
        joints = np.concatenate([attribute(f"JOINTS_{i}", ("VEC4",)) for i in sets], 1)
        weights = [attribute(f"WEIGHTS_{i}", ("VEC4",)) for i in sets]
        if any(w is None for w in weights):
            raise MalformedAsset("joints without weights")
        weights = np.concatenate(weights, 1)  # [P, S]
        joints = np.rint(joints).astype(np.int64)
        joints = np.where(weights == 0, 0, joints)  # numbers of unused slots mean nothing
        if joints.min() < 0 or joints.max() >= len(bones):
            raise MalformedAsset(f"a vertex names joint {joints.max()} of {len(bones)}")
        total = weights.sum(1, keepdims=True)
        first = np.arange(weights.shape[1]) == 0  # no weight at all: the first joint holds it
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1), first)
        return joints, weights.astype(np.float32), bones, inverse_bind

    def _morphs(self, primitive: dict, mesh: int, node: _Node, P: int):
        targets = primitive.get("targets", [])
        M = len(targets)
        rest = node.weights
        if rest is None:
            rest = np.asarray(self._get("meshes", mesh).get("weights", [0.0] * M), np.float32)
        if rest.shape != (M,) or not np.isfinite(rest).all():
            raise MalformedAsset(f"{rest.shape[0]} morph weights for {M} targets")
        if M == 0:
            return None, None, rest
        if M * P * 6 > MAX_MORPH_VALUES:
            raise MalformedAsset(f"{M} morph targets of {P} vertices are too many")

        def deltas(key):
            out = np.zeros((M, P, 3), np.float32)
            for m, target in enumerate(targets):
                if key in target:
                    values = self._accessor(target[key], ("VEC3",))
                    if len(values) != P:
                        raise MalformedAsset(f"a morph target has {len(values)} of {P} vertices")
                    out[m] = values
            return out

        return deltas("POSITION"), deltas("NORMAL"), rest

    def _material(self, index: int | None) -> dict:
        out = {
            "factor": np.ones(4),
            "emission": np.zeros(3),
            "texture": -1,
            "texcoord": 0,
            "uv": np.eye(3),
            "cutoff": 0.0,
        }
        if index is None:
            return out
        material = self._get("materials", index)
        pbr = material.get("pbrMetallicRoughness", {})
        out["factor"] = np.clip(np.asarray(pbr.get("baseColorFactor", [1, 1, 1, 1]), float), 0, 1)
        out["emission"] = np.clip(
            np.asarray(material.get("emissiveFactor", [0, 0, 0]), float), 0, 1
        )
        if out["factor"].shape != (4,) or out["emission"].shape != (3,):
            raise MalformedAsset(f"material {index} has colours of the wrong length")
        match material.get("alphaMode", "OPAQUE"):
            case "MASK":
                out["cutoff"] = float(material.get("alphaCutoff", 0.5))
            case "BLEND":
                out["cutoff"] = 0.1  # nothing is see-through: what is nearly clear is left out
            case _:
                out["factor"][3] = 1.0
        if "emissiveTexture" in material:
            out["emission"] = np.zeros(3)  # its map would modulate the factor; it is not read
        if "baseColorTexture" in pbr:
            info = pbr["baseColorTexture"]
            out["texture"] = self._texture(info["index"])
            out["texcoord"] = int(info.get("texCoord", 0))
            transform = info.get("extensions", {}).get("KHR_texture_transform")
            if transform is not None:
                out["uv"] = _uv_transform(transform)
                out["texcoord"] = int(transform.get("texCoord", out["texcoord"]))
        return out

    def _texture(self, index: int) -> int:
        """Index of the decoded image, -1 where it lies outside the file (drawn without it)."""
        image_index = self._get("textures", index).get("source")
        if image_index is None:
            return -1
        if image_index in self.texture_of_image:
            return self.texture_of_image[image_index]
        image = self._get("images", image_index)
        if "bufferView" in image:
            data, start, length, _ = self._view(image["bufferView"])
            data = data[start : start + length]
        else:
            data = _data_uri(image["uri"])
        if data is None:
            self.warnings.append(f"image {image_index} lies outside the file: drawn without it")
            result = -1
        else:
            if len(self.textures) >= MAX_TEXTURES:
                raise MalformedAsset(f"more than {MAX_TEXTURES} textures")
            self.textures.append(_decode_image(data, image_index))
            result = len(self.textures) - 1
        self.texture_of_image[image_index] = result
        return result

    def _clips(self, nodes: list[_Node]) -> tuple[list[Clip], list[list[_Channel]]]:
        clips, all_channels, budget = [], [], MAX_KEY_VALUES
        for index, animation in enumerate(self.json.get("animations", [])):
            channels = []
            for channel in animation["channels"]:
                target = channel["target"]
                if target["path"] not in _PATHS or "node" not in target:
                    continue  # animated pointers of extensions: nothing that we draw
                node = target["node"]
                if not isinstance(node, int) or not 0 <= node < len(nodes):
                    raise MalformedAsset(f"animation {index} moves node {node}, which is not there")
                if "matrix" in self.json["nodes"][node] and target["path"] != "weights":
                    raise MalformedAsset(f"animation {index} moves node {node}, which has a matrix")
                samplers = animation["samplers"]
                if not 0 <= channel["sampler"] < len(samplers):
                    raise MalformedAsset(f"animation {index} names a sampler that is not there")
                made = self._channel(node, target["path"], samplers[channel["sampler"]], nodes)
                budget -= made.values.size
                if budget < 0:
                    raise MalformedAsset("animations with too many numbers")
                channels.append(made)
            start = min((c.times[0] for c in channels), default=0.0)
            end = max((c.times[-1] for c in channels), default=0.0)
            name = str(animation.get("name") or f"clip {index}")
            clips.append(Clip(index, name, float(start), float(end - start)))
            all_channels.append(channels)
        return clips, all_channels

    def _channel(self, node: int, path: str, sampler: dict, nodes: list[_Node]) -> _Channel:
        times = self._accessor(sampler["input"], ("SCALAR",))[:, 0].astype(np.float64)
        if (np.diff(times) < 0).any() or times[0] < 0:
            raise MalformedAsset(f"key times of node {node} run backwards")
        interpolation = sampler.get("interpolation", "LINEAR")
        if interpolation not in ("LINEAR", "STEP", "CUBICSPLINE"):
            raise MalformedAsset(f"interpolation {interpolation!r}")
        kinds = {"rotation": ("VEC4",), "weights": ("SCALAR",)}.get(path, ("VEC3",))
        values = self._accessor(sampler["output"], kinds, use="animation").astype(np.float64)
        triple = 3 if interpolation == "CUBICSPLINE" else 1
        if path == "weights":
            mesh = nodes[node].mesh
            primitives = [] if mesh is None else self._get("meshes", mesh)["primitives"]
            M = len(primitives[0].get("targets", [])) if primitives else 0
            if M == 0 or values.size != len(times) * triple * M:
                raise MalformedAsset(f"morph keys of node {node} do not fit its {M} targets")
            values = values.reshape(-1, M)
        if len(values) != triple * len(times):
            raise MalformedAsset(
                f"{path} of node {node} has {len(values)} values for {len(times)} keys"
            )
        if triple == 3:
            values = values.reshape(len(times), 3, -1)
        return _Channel(node, path, interpolation, times, values)


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
    if len(found[b"JSON"]) > MAX_JSON_BYTES:
        raise MalformedAsset(f"a JSON chunk larger than {MAX_JSON_BYTES >> 20} MB")
    tree = json.loads(found[b"JSON"].decode("utf-8"))
    if not isinstance(tree, dict):
        raise MalformedAsset("the JSON chunk is not an object")
    return tree, found.get(b"BIN\0")


def _data_uri(uri: str) -> bytes | None:
    """The bytes of a base64 data URI; None for any other address, which is never opened."""
    head, comma, body = uri.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        return None
    return base64.b64decode(body, validate=True)


def _decode_image(data: bytes, index: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            width, height = image.size
            if width * height > MAX_TEXTURE_PIXELS:
                raise MalformedAsset(f"image {index} is {width}x{height}, too large")
            image = image.convert("RGBA")
            if max(image.size) > DRAWN_TEXTURE_SIDE:
                image.thumbnail((DRAWN_TEXTURE_SIDE, DRAWN_TEXTURE_SIDE))
            return np.asarray(image)
    except Image.DecompressionBombError as error:
        raise MalformedAsset(f"image {index} is too large") from error
    except (OSError, SyntaxError) as error:
        raise MalformedAsset(f"image {index} cannot be read") from error


def _uv_transform(transform: dict) -> np.ndarray:
    """KHR_texture_transform: translation * rotation * scale, as 3x3."""
    ox, oy = transform.get("offset", (0, 0))
    sx, sy = transform.get("scale", (1, 1))
    angle_rad = float(transform.get("rotation", 0.0))
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    move = np.array([[1, 0, ox], [0, 1, oy], [0, 0, 1]], float)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return move @ turn @ np.diag([sx, sy, 1.0])


def _merge_draws(draws: list[Draw], joined: dict) -> list[Draw]:
    """Sorts triangles by texture, so that an object takes as many draws as it has textures."""
    triangles, merged, out, first = joined["triangles"], [], [], 0
    for key in sorted({(d.texture, d.alpha_cutoff) for d in draws}):
        group = [d for d in draws if (d.texture, d.alpha_cutoff) == key]
        merged += [triangles[d.first : d.first + d.count] for d in group]
        count = sum(d.count for d in group)
        out.append(Draw(first, count, *key))
        first += count
    joined["triangles"] = np.concatenate(merged)
    return out


def _compose(translation, rotation, scale, T: int) -> np.ndarray:
    """Matrices [T, 4, 4] of translation * rotation * scale; rotation is xyzw of any length."""
    q = np.broadcast_to(np.asarray(rotation, np.float64), (T, 4))
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    x, y, z, w = np.moveaxis(
        np.where(norm > 1e-12, q / np.maximum(norm, 1e-12), [0, 0, 0, 1]), 1, 0
    )
    m = np.zeros((T, 4, 4))
    m[:, 0, 0], m[:, 0, 1], m[:, 0, 2] = (
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
    )
    m[:, 1, 0], m[:, 1, 1], m[:, 1, 2] = (
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
    )
    m[:, 2, 0], m[:, 2, 1], m[:, 2, 2] = (
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    )
    m[:, :3, :3] *= np.broadcast_to(np.asarray(scale, np.float64), (T, 3))[:, None, :]
    m[:, :3, 3] = translation
    m[:, 3, 3] = 1
    return m


def _sample(channel: _Channel, times: np.ndarray) -> np.ndarray:
    """A channel's values [T, C] at `times` seconds, held before the first and after the last key.

    LINEAR is spherical for rotations; CUBICSPLINE is Hermite with tangents per second (appendix C).
    """
    keys, values = channel.times, channel.values
    upper = np.clip(np.searchsorted(keys, times, side="right"), 1, max(1, len(keys) - 1))
    lower = upper - 1
    upper = np.minimum(upper, len(keys) - 1)
    span = keys[upper] - keys[lower]
    u = np.where(span > 0, (times - keys[lower]) / np.where(span > 0, span, 1), 0.0)
    u = np.clip(u, 0, 1)[:, None]
    match channel.interpolation:
        case "STEP":
            return values[np.where(times >= keys[upper], upper, lower)]
        case "LINEAR":
            a, b = values[lower], values[upper]
            if channel.path != "rotation":
                return a + u * (b - a)
            return _slerp(a, b, u)
        case _:
            d = span[:, None]
            a, out_tangent = values[lower, 1], values[lower, 2] * d
            b, in_tangent = values[upper, 1], values[upper, 0] * d
            u2, u3 = u * u, u * u * u
            return (
                (2 * u3 - 3 * u2 + 1) * a
                + (u3 - 2 * u2 + u) * out_tangent
                + (3 * u2 - 2 * u3) * b
                + (u3 - u2) * in_tangent
            )


def _slerp(a: np.ndarray, b: np.ndarray, u: np.ndarray) -> np.ndarray:
    a = a / np.maximum(np.linalg.norm(a, axis=-1, keepdims=True), 1e-12)
    b = b / np.maximum(np.linalg.norm(b, axis=-1, keepdims=True), 1e-12)
    dot = (a * b).sum(-1, keepdims=True)
    b = np.where(dot < 0, -b, b)  # the short way round
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    sine = np.sin(angle)
    near = sine < 1e-6
    safe = np.where(near, 1, sine)
    wa = np.where(near, 1 - u, np.sin((1 - u) * angle) / safe)
    wb = np.where(near, u, np.sin(u * angle) / safe)
    return wa * a + wb * b
