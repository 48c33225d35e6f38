"""An asset in memory and its vertices at any time: clips, node transforms, skins, morphs."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32, UInt8

from fourdstar_jax.data.gltf.container import MalformedAsset

HUE_SHARE, HUE_GAP = 0.03, 30.0  # of the surface; degrees between two hues that are distinct


@dataclass(frozen=True)
class Clip:
    """One animation of a file."""

    index: int
    name: str
    start_s: float  # first key of all channels
    duration_s: float  # last key minus first


Wrap = Literal["repeat", "mirror", "clamp"]


class Texture(NamedTuple):
    """A picture and how it is read outside of [0, 1] and between its pixels."""

    image: UInt8[np.ndarray, "h w 4"]  # sRGB, straight alpha, row 0 at v = 0
    wrap_u: Wrap = "repeat"
    wrap_v: Wrap = "repeat"
    smooth: bool = True  # else the nearest pixel, where the picture is enlarged


class Surface(NamedTuple):
    """What the triangles of a draw have in common."""

    texture: int = -1  # index into `Asset.textures`, -1 for none; times the vertices' colours
    emissive_texture: int = -1  # the same, times the vertices' emission
    alpha_cutoff: float = 0.0  # fragments below it are not drawn
    unlit: bool = False  # KHR_materials_unlit: the colour is what is seen
    double_sided: bool = False  # else only triangles that wind anticlockwise are seen


@dataclass(frozen=True)
class Draw:
    """A run of triangles of one surface."""

    first: int  # triangle
    count: int
    surface: Surface


class Posed(NamedTuple):
    """Vertices at some times, world frame."""

    positions: Float32[np.ndarray, "T P 3"]
    normals: Float32[np.ndarray, "T P 3"] | None  # not unit length; zero where the file has none


@dataclass
class Node:
    """A node of the file at rest."""

    children: list[int]
    mesh: int | None
    skin: int | None
    matrix: np.ndarray | None  # [4, 4]
    translation: np.ndarray
    rotation: np.ndarray  # xyzw, as in the file
    scale: np.ndarray
    weights: np.ndarray | None
    name: str
    drawn: bool = True  # in the default scene, and not hidden


@dataclass
class Channel:
    """The keys of one property of a node in a clip."""

    node: int
    path: str
    interpolation: str
    times: np.ndarray  # [S] seconds
    values: np.ndarray  # [S, C], or [S, 3, C] (in-tangent, value, out-tangent) for CUBICSPLINE


@dataclass
class Part:
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
    uvs: Float32[np.ndarray, "P 2"]  # of the base colour's texture
    emissive_uvs: Float32[np.ndarray, "P 2"]
    colors: Float32[np.ndarray, "P 4"]  # vertex colour times base colour, linear RGBA
    emission: Float32[np.ndarray, "P 3"]  # linear RGB, may exceed 1
    triangles: Int32[np.ndarray, "F 3"]
    draws: list[Draw]
    textures: list[Texture]
    clips: list[Clip]
    warnings: list[str]
    _nodes: list[Node] = field(repr=False)
    _order: list[tuple[int, int]] = field(repr=False)  # (node, parent or -1), parents first
    _parts: list[Part] = field(repr=False)
    _channels: list[list[Channel]] = field(repr=False)  # one list a clip
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
        world, morphs = animate(self._nodes, self._order, channels, times_s + start)
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
                    # Blends of bones turn normals as they turn points, as in other viewers.
                    turn = _for_normals(rotate) if len(part.bones) == 1 else rotate
                    out_normals[:, span] = np.einsum("ptij,tpj->tpi", turn, n)
        if not np.isfinite(out).all():
            where = "the rest pose" if clip is None else f"clip {self.clips[clip].name!r}"
            raise MalformedAsset(f"{where} has vertices that are not finite")
        return Posed(out, out_normals)

    def coloured(self) -> bool:
        """Whether it has a texture or at least two distinct hues on its surface."""
        if self.textures:
            return True
        corners = self.positions[self.triangles].astype(np.float64)
        areas = np.linalg.norm(
            np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=-1
        )
        linear = np.clip(
            self.colors[self.triangles[:, 0], :3] + self.emission[self.triangles[:, 0]], 0, 1
        )
        rgb = np.where(linear < 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
        high, low = rgb.max(1), rgb.min(1)
        vivid = high - low > 0.1
        r, g, b = rgb[vivid].T
        chroma = (high - low)[vivid]
        sectors = [(g - b) / chroma % 6, (b - r) / chroma + 2, (r - g) / chroma + 4]
        hues = 60 * np.choose(rgb[vivid].argmax(1), sectors)
        share = np.bincount((hues // 5).astype(int), areas[vivid], 72) / max(areas.sum(), 1e-12)
        found = 5 * np.flatnonzero(share >= HUE_SHARE)
        apart = np.abs(found[:, None] - found)
        return bool((np.minimum(apart, 360 - apart) >= HUE_GAP).any())

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
                turns[:, names.index(name)] = sample(channel, times)
        return turns / np.maximum(np.linalg.norm(turns, axis=-1, keepdims=True), 1e-12)


def animate(
    nodes: list[Node], order: list[tuple[int, int]], channels: list[Channel], times: np.ndarray
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """World matrices [T, nodes, 4, 4], and the morph weights [T, M] of the nodes that have some.

    `order` is (node, parent or -1), parents first.
    """
    T, count = len(times), len(nodes)
    local = np.broadcast_to(np.eye(4), (T, count, 4, 4)).copy()
    trs = {}
    morphs = {}
    for channel in channels:
        value = sample(channel, times)
        if channel.path == "weights":
            morphs[channel.node] = value
        else:
            trs.setdefault(channel.node, {})[channel.path] = value
    for i, node in enumerate(nodes):
        if i in trs:
            moved = trs[i]
            local[:, i] = compose(
                moved.get("translation", node.translation),
                moved.get("rotation", node.rotation),
                moved.get("scale", node.scale),
                T,
            )
        elif node.matrix is not None:
            local[:, i] = node.matrix
    world = np.empty_like(local)
    for i, parent in order:
        world[:, i] = local[:, i] if parent < 0 else world[:, parent] @ local[:, i]
    return world, morphs


def _for_normals(m: np.ndarray) -> np.ndarray:
    """The inverse transposes of matrices [..., 3, 3], up to a positive factor.

    Cofactors, which exist for a flat scale, too; a reflection must not turn normals inside out.
    """
    a, b, c = m[..., 0], m[..., 1], m[..., 2]  # columns
    cofactors = np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], axis=-1)
    determinant = (a * cofactors[..., 0]).sum(-1)
    return np.where(determinant[..., None, None] < 0, -cofactors, cofactors)


def decompose(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Translation, rotation (xyzw) and scale of a matrix [4, 4] without shear."""
    scale = np.linalg.norm(matrix[:3, :3], axis=0)
    if np.linalg.det(matrix[:3, :3]) < 0:
        scale[0] = -scale[0]
    r = matrix[:3, :3] / np.where(scale == 0, 1, scale)
    # The eigenvector of the largest eigenvalue (Bar-Itzhack 2000) holds for any rotation.
    k = np.array(
        [
            [r[0, 0] - r[1, 1] - r[2, 2], 0, 0, 0],
            [r[1, 0] + r[0, 1], r[1, 1] - r[0, 0] - r[2, 2], 0, 0],
            [r[2, 0] + r[0, 2], r[2, 1] + r[1, 2], r[2, 2] - r[0, 0] - r[1, 1], 0],
            [r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1], np.trace(r)],
        ]
    )
    return matrix[:3, 3].copy(), np.linalg.eigh(k)[1][:, -1], scale


def compose(translation, rotation, scale, T: int) -> np.ndarray:
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


def sample(channel: Channel, times: np.ndarray) -> np.ndarray:
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
