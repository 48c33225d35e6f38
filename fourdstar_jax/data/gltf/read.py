"""Reads a GLB file into an `Asset`: nodes, meshes, skins, morph targets, materials and clips.

Section numbers refer to the glTF 2.0 specification.
"""

import hashlib
import io
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fourdstar_jax.data.gltf.asset import Asset, Channel, Clip, Draw, Node, Part, compose
from fourdstar_jax.data.gltf.container import (
    MAX_FILE_BYTES,
    Container,
    MalformedAsset,
    data_uri,
)

MAX_NODES = 20_000
MAX_VERTICES = 2_000_000  # after instancing: a mesh under ten nodes counts ten times
MAX_TRIANGLES = 4_000_000
MAX_KEY_VALUES = 64 << 20  # numbers in all animation samplers together
MAX_MORPH_VALUES = 64 << 20
MAX_TEXTURES = 64
MAX_TEXTURE_PIXELS = 4096 * 4096
DRAWN_TEXTURE_SIDE = 1024  # larger textures are reduced when read

_PATHS = ("translation", "rotation", "scale", "weights")


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


@dataclass
class _Material:
    """The parts of a material that are drawn; these are the values without one."""

    factor: np.ndarray = field(default_factory=lambda: np.ones(4))  # base colour, linear RGBA
    emission: np.ndarray = field(default_factory=lambda: np.zeros(3))  # linear RGB
    texture: int = -1  # index into `Asset.textures`, -1 for none
    texcoord: int = 0  # set of UVs that the texture uses
    uv: np.ndarray = field(default_factory=lambda: np.eye(3))  # transform of the UVs
    cutoff: float = 0.0  # of alpha


class _Reader:
    """Turns the bytes of a file into an Asset."""

    def __init__(self, data: bytes, name: str):
        self.name, self.sha256 = name, hashlib.sha256(data).hexdigest()
        self.file = Container(data)
        self.warnings: list[str] = []
        self.textures: list[np.ndarray] = []
        self.texture_of_image: dict[int, int] = {}

    def asset(self) -> Asset:
        nodes = [self._node(n) for n in self.file.json.get("nodes", [])]
        order = self._order(nodes)
        parts, chunks, draws = [], [], []
        num_vertices = num_triangles = 0
        for i, _ in order:
            mesh = nodes[i].mesh
            if mesh is None:
                continue
            for primitive in self.file.item("meshes", mesh)["primitives"]:
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
        skins = self.file.json.get("skins", [])
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

    def _node(self, node: dict) -> Node:
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
            matrix = compose(*trs, 1)[0]
        weights = node.get("weights")
        return Node(
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

    def _order(self, nodes: list[Node]) -> list[tuple[int, int]]:
        """Pairs (node, parent) of the default scene, parents first; one parent a node (3.5.2)."""
        if len(nodes) > MAX_NODES:
            raise MalformedAsset(f"{len(nodes)} nodes, more than {MAX_NODES}")
        scenes = self.file.json.get("scenes", [])
        children = {c for n in nodes for c in n.children}
        if scenes:
            roots = self.file.item("scenes", self.file.json.get("scene", 0)).get("nodes", [])
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

    def _primitive(self, primitive: dict, mesh: int, node_index: int, node: Node, count: int):
        attributes = primitive["attributes"]
        positions = self.file.accessor(attributes["POSITION"], ("VEC3",), use="POSITION")
        P = len(positions)
        if P > MAX_VERTICES:
            raise MalformedAsset(f"more than {MAX_VERTICES:,} vertices")

        def attribute(key, kinds):
            if key not in attributes:
                return None
            values = self.file.accessor(attributes[key], kinds, use=key)
            if len(values) != P:
                raise MalformedAsset(f"{key} has {len(values)} values for {P} vertices")
            return values

        triangles = self._triangles(primitive, P)
        material = self._material(primitive.get("material"))
        colors = np.broadcast_to(material.factor, (P, 4)).astype(np.float32)
        vertex_color = attribute("COLOR_0", ("VEC3", "VEC4"))
        if vertex_color is not None:
            colors[:, : vertex_color.shape[1]] *= np.clip(vertex_color, 0, 1)
        uvs = attribute(f"TEXCOORD_{material.texcoord}", ("VEC2",))
        if material.texture >= 0 and uvs is None:
            material.texture = -1
        uvs = np.zeros((P, 2), np.float32) if uvs is None else uvs
        normals = attribute("NORMAL", ("VEC3",))
        arrays = {
            "positions": positions,
            "normals": np.zeros((P, 3), np.float32) if normals is None else normals,
            "uvs": (uvs @ material.uv[:2, :2].T + material.uv[:2, 2]).astype(np.float32),
            "colors": colors,
            "emission": np.broadcast_to(material.emission, (P, 3)).astype(np.float32),
            "triangles": triangles,
        }
        joints, weights, bones, inverse_bind = self._skin(
            attribute, attributes, node, node_index, P, count
        )
        morph_positions, morph_normals, rest = self._morphs(primitive, mesh, node, P)
        part = Part(
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
        return arrays, part, Draw(0, 0, material.texture, material.cutoff)

    def _triangles(self, primitive: dict, P: int) -> np.ndarray:
        """Triangles [F, 3] (3.7.2.1): strips and fans unrolled; of points and lines, none."""
        if "indices" in primitive:
            index = self.file.accessor(primitive["indices"], ("SCALAR",), raw=True)[:, 0]
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

    def _skin(self, attribute, attributes, node: Node, node_index: int, P: int, count: int):
        rigid = (
            np.zeros((P, 1), np.int64),
            np.ones((P, 1), np.float32),
            np.array([node_index]),
            np.eye(4)[None],
        )
        if node.skin is None or "JOINTS_0" not in attributes:
            return rigid
        skin = self.file.item("skins", node.skin)
        bones = np.asarray(skin["joints"], np.int64)
        if not len(bones) or bones.min() < 0 or bones.max() >= count:
            raise MalformedAsset(f"skin {node.skin} names a joint that does not exist")
        if "inverseBindMatrices" in skin:
            flat = self.file.accessor(skin["inverseBindMatrices"], ("MAT4",))
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

    def _morphs(self, primitive: dict, mesh: int, node: Node, P: int):
        targets = primitive.get("targets", [])
        M = len(targets)
        rest = node.weights
        if rest is None:
            rest = np.asarray(self.file.item("meshes", mesh).get("weights", [0.0] * M), np.float32)
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
                    values = self.file.accessor(target[key], ("VEC3",))
                    if len(values) != P:
                        raise MalformedAsset(f"a morph target has {len(values)} of {P} vertices")
                    out[m] = values
            return out

        return deltas("POSITION"), deltas("NORMAL"), rest

    def _material(self, index: int | None) -> _Material:
        out = _Material()
        if index is None:
            return out
        material = self.file.item("materials", index)
        pbr = material.get("pbrMetallicRoughness", {})
        out.factor = np.clip(np.asarray(pbr.get("baseColorFactor", [1, 1, 1, 1]), float), 0, 1)
        out.emission = np.clip(np.asarray(material.get("emissiveFactor", [0, 0, 0]), float), 0, 1)
        if out.factor.shape != (4,) or out.emission.shape != (3,):
            raise MalformedAsset(f"material {index} has colours of the wrong length")
        match material.get("alphaMode", "OPAQUE"):
            case "MASK":
                out.cutoff = float(material.get("alphaCutoff", 0.5))
            case "BLEND":
                out.cutoff = 0.1  # nothing is see-through: what is nearly clear is left out
            case _:
                out.factor[3] = 1.0
        if "emissiveTexture" in material:
            out.emission = np.zeros(3)  # its map would modulate the factor; it is not read
        if "baseColorTexture" in pbr:
            info = pbr["baseColorTexture"]
            out.texture = self._texture(info["index"])
            out.texcoord = int(info.get("texCoord", 0))
            transform = info.get("extensions", {}).get("KHR_texture_transform")
            if transform is not None:
                out.uv = _uv_transform(transform)
                out.texcoord = int(transform.get("texCoord", out.texcoord))
        return out

    def _texture(self, index: int) -> int:
        """Index of the decoded image, -1 where it lies outside the file (drawn without it)."""
        image_index = self.file.item("textures", index).get("source")
        if image_index is None:
            return -1
        if image_index in self.texture_of_image:
            return self.texture_of_image[image_index]
        image = self.file.item("images", image_index)
        if "bufferView" in image:
            data, start, length, _ = self.file.view(image["bufferView"])
            data = data[start : start + length]
        else:
            data = data_uri(image["uri"])
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

    def _clips(self, nodes: list[Node]) -> tuple[list[Clip], list[list[Channel]]]:
        clips, all_channels, budget = [], [], MAX_KEY_VALUES
        for index, animation in enumerate(self.file.json.get("animations", [])):
            channels = []
            for channel in animation["channels"]:
                target = channel["target"]
                if target["path"] not in _PATHS or "node" not in target:
                    continue  # animated pointers of extensions: nothing that we draw
                node = target["node"]
                if not isinstance(node, int) or not 0 <= node < len(nodes):
                    raise MalformedAsset(f"animation {index} moves node {node}, which is not there")
                if "matrix" in self.file.json["nodes"][node] and target["path"] != "weights":
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

    def _channel(self, node: int, path: str, sampler: dict, nodes: list[Node]) -> Channel:
        times = self.file.accessor(sampler["input"], ("SCALAR",))[:, 0].astype(np.float64)
        if (np.diff(times) < 0).any() or times[0] < 0:
            raise MalformedAsset(f"key times of node {node} run backwards")
        interpolation = sampler.get("interpolation", "LINEAR")
        if interpolation not in ("LINEAR", "STEP", "CUBICSPLINE"):
            raise MalformedAsset(f"interpolation {interpolation!r}")
        kinds = {"rotation": ("VEC4",), "weights": ("SCALAR",)}.get(path, ("VEC3",))
        values = self.file.accessor(sampler["output"], kinds, use="animation").astype(np.float64)
        triple = 3 if interpolation == "CUBICSPLINE" else 1
        if path == "weights":
            mesh = nodes[node].mesh
            primitives = [] if mesh is None else self.file.item("meshes", mesh)["primitives"]
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
        return Channel(node, path, interpolation, times, values)


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
