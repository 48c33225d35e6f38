"""Reads a GLB file into an `Asset`: nodes, meshes, skins, morph targets, materials and clips.

Section numbers refer to the glTF 2.0 specification.
"""

import hashlib
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fourdstar_jax.data.gltf.asset import (
    Asset,
    Channel,
    Clip,
    Draw,
    Node,
    Part,
    Surface,
    animate,
    compose,
    decompose,
)
from fourdstar_jax.data.gltf.container import MAX_FILE_BYTES, Container, MalformedAsset
from fourdstar_jax.data.gltf.materials import Materials, Notes

MAX_VERTICES = 2_000_000  # after instancing: a mesh under ten nodes counts ten times
MAX_TRIANGLES = 4_000_000
MAX_KEY_VALUES = 64 << 20  # numbers in all animation samplers together
MAX_MORPH_VALUES = 64 << 20

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


class _Reader:
    """Turns the bytes of a file into an Asset."""

    def __init__(self, data: bytes, name: str):
        self.name, self.sha256 = name, hashlib.sha256(data).hexdigest()
        self.file = Container(data)
        self.notes = Notes()
        self.materials = Materials(self.file, self.notes)

    def asset(self) -> Asset:
        nodes = [self._node(n) for n in self.file.json.get("nodes", [])]
        order = self._order(nodes)
        world = animate(nodes, order, [], np.zeros(1))[0][0]
        parts, chunks, draws = [], [], []
        num_vertices = num_triangles = 0
        for i, _ in order:
            mesh = nodes[i].mesh
            if mesh is None or not nodes[i].drawn:
                continue
            instances = self._instances(i)
            for primitive in self.file.item("meshes", mesh)["primitives"]:
                if self._is_empty(primitive):
                    continue
                arrays, part, surface = self._primitive(primitive, mesh, i, nodes[i], len(nodes))
                triangles = arrays["triangles"]
                if len(triangles) == 0:
                    continue
                rigid = nodes[i].skin is None
                for instance in instances if rigid else instances[:1]:
                    bind = instance[None] if rigid else part.inverse_bind
                    mirrored = np.linalg.det((world[part.bones] @ bind)[:, :3, :3]) < 0
                    # anticlockwise is the outside; a mirror turns it round
                    wound = triangles[:, ::-1] if mirrored.mean() > 0.5 else triangles
                    parts.append(replace(part, first=num_vertices, inverse_bind=bind))
                    chunks.append({**arrays, "triangles": wound + num_vertices})
                    num_vertices += part.count
                    draws.append(Draw(num_triangles, len(triangles), surface))
                    num_triangles += len(triangles)
                    if num_vertices > MAX_VERTICES or num_triangles > MAX_TRIANGLES:
                        raise MalformedAsset(
                            f"more than {MAX_VERTICES:,} vertices or {MAX_TRIANGLES:,} triangles"
                        )
        if not parts:
            raise MalformedAsset("no triangles in the default scene")
        joined: dict[str, Any] = {
            key: np.concatenate([c[key] for c in chunks]) for key in chunks[0]
        }
        clips, channels = self._clips(nodes)
        for extension in self.file.unread_extensions:
            self.notes.warn(f"the extension {extension} is not read")
        skins = self.file.json.get("skins", [])
        if skins:
            joints = {nodes[j].name for skin in skins for j in skin["joints"]}
        else:
            joints = {nodes[c.node].name for clip in channels for c in clip}
        return Asset(
            name=self.name,
            sha256=self.sha256,
            draws=_merge_draws(draws, joined),
            textures=self.materials.textures,
            clips=clips,
            warnings=self.notes.lines(),
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
            trs = decompose(matrix)  # for animations, which ought to move other nodes only (3.11)
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
            drawn=bool(
                node.get("extensions", {}).get("KHR_node_visibility", {}).get("visible", True)
            ),
        )

    def _is_empty(self, primitive: dict) -> bool:
        """Whether a primitive has no vertices, which other readers skip as well."""
        position = primitive["attributes"].get("POSITION")
        empty = position is None or self.file.item("accessors", position).get("count") == 0
        if empty:
            self.notes.leave_out("a primitive without vertices is left out")
        return empty

    def _instances(self, node: int) -> np.ndarray:
        """[instances, 4, 4] under a node: EXT_mesh_gpu_instancing, or the one that it is."""
        extensions = self.file.item("nodes", node).get("extensions", {})
        if "EXT_mesh_gpu_instancing" not in extensions:
            return np.eye(4)[None]
        found = {}
        for key, kind in (("TRANSLATION", "VEC3"), ("ROTATION", "VEC4"), ("SCALE", "VEC3")):
            accessor = extensions["EXT_mesh_gpu_instancing"]["attributes"].get(key)
            if accessor is not None:
                found[key] = self.file.accessor(accessor, (kind,), use=key)
        counts = {len(values) for values in found.values()}
        if len(counts) != 1:
            raise MalformedAsset(f"node {node} has {sorted(counts)} instances")
        return compose(
            found.get("TRANSLATION", [0.0, 0, 0]),
            found.get("ROTATION", [0.0, 0, 0, 1]),
            found.get("SCALE", [1.0, 1, 1]),
            counts.pop(),
        )

    def _order(self, nodes: list[Node]) -> list[tuple[int, int]]:
        """Pairs (node, parent) of the default scene, parents first; one parent a node (3.5.2).

        A node that KHR_node_visibility hides hides what is below it.
        """
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
            nodes[i].drawn &= parent < 0 or nodes[parent].drawn
            stack.extend((c, i) for c in reversed(nodes[i].children))
        outside = [i for i in range(len(nodes)) if i not in seen]
        stack = [(i, -1) for i in outside if i not in children]
        while stack:
            i, parent = stack.pop()
            if not 0 <= i < len(nodes) or i in seen:
                raise MalformedAsset(f"node {i} has two parents or does not exist")
            seen.add(i)
            nodes[i].drawn = False
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
        material = self.materials.material(primitive.get("material"))
        colors = np.broadcast_to(material.factor, (P, 4)).astype(np.float32)
        vertex_color = attribute("COLOR_0", ("VEC3", "VEC4"))
        if vertex_color is not None:
            colors[:, : vertex_color.shape[1]] *= np.clip(vertex_color, 0, 1)
        maps = []
        for index, texcoord, transform in (material.base, material.emissive):
            uvs = attribute(f"TEXCOORD_{texcoord}", ("VEC2",)) if index >= 0 else None
            maps.append(-1 if uvs is None else index)
            uvs = np.zeros((P, 2), np.float32) if uvs is None else uvs
            maps.append((uvs @ transform[:2, :2].T + transform[:2, 2]).astype(np.float32))
        texture, uvs, emissive_texture, emissive_uvs = maps
        normals = attribute("NORMAL", ("VEC3",))
        arrays = {
            "positions": positions,
            "normals": np.zeros((P, 3), np.float32) if normals is None else normals,
            "uvs": uvs,
            "emissive_uvs": emissive_uvs,
            "colors": colors,
            "emission": np.broadcast_to(material.emission, (P, 3)).astype(np.float32),
            "triangles": triangles,
        }
        joints, weights, bones, inverse_bind = self._skin(
            attribute, attributes, node, node_index, P, count
        )
        placeless = ~np.isfinite(weights).all(axis=1)  # viewers show no triangle with such a corner
        if placeless.any():
            self.notes.warn(
                f"{placeless.sum()} of {P} vertices have skin weights that are not numbers"
            )
            triangles = triangles[~placeless[triangles].any(axis=1)]
            arrays["triangles"] = triangles
        morph_positions, morph_normals, rest = self._morphs(primitive, mesh, node, P)
        used = np.unique(triangles)  # the others are not seen, and must not widen the box
        for key, values in arrays.items():
            if key != "triangles":
                arrays[key] = values[used]
        arrays["triangles"] = np.searchsorted(used, triangles).astype(np.int32)
        joints, weights = joints[used], weights[used]
        if morph_positions is not None and morph_normals is not None:
            morph_positions, morph_normals = morph_positions[:, used], morph_normals[:, used]
        part = Part(
            0,
            len(used),
            bones,
            inverse_bind,
            joints,
            weights,
            node_index,
            morph_positions,
            morph_normals if normals is not None else None,
            rest,
        )
        surface = Surface(
            texture, emissive_texture, material.cutoff, material.unlit, material.double_sided
        )
        return arrays, part, surface

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
                self.notes.leave_out("points and lines are not drawn")
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
        meant = np.isfinite(weights) & (weights != 0)
        joints = np.where(meant, joints, 0)  # numbers of unused slots mean nothing
        if joints.min() < 0 or joints.max() >= len(bones):
            raise MalformedAsset(f"a vertex names joint {joints.max()} of {len(bones)}")
        total = weights.sum(1, keepdims=True)
        first = np.arange(weights.shape[1]) == 0  # no weight at all: the first joint holds it
        weights = np.where(total <= 0, first, weights / np.where(total <= 0, 1, total))
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
                    self.notes.warn(
                        f"animation {index} moves node {node}, which has a matrix: taken apart"
                    )
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
        if (np.diff(times) < 0).any():
            raise MalformedAsset(f"key times of node {node} run backwards")
        if times[0] < 0:
            self.notes.warn(f"key times of node {node} begin at {times[0]:g} s, before zero")
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


def _merge_draws(draws: list[Draw], joined: dict) -> list[Draw]:
    """Sorts triangles by surface, so that an object takes as many draws as it has surfaces."""
    triangles, merged, out, first = joined["triangles"], [], [], 0
    for surface in sorted({d.surface for d in draws}):
        group = [d for d in draws if d.surface == surface]
        merged += [triangles[d.first : d.first + d.count] for d in group]
        count = sum(d.count for d in group)
        out.append(Draw(first, count, surface))
        first += count
    joined["triangles"] = np.concatenate(merged)
    return out
