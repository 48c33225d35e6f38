"""Clips as sequences of frames: sampling in time, the size of what is read, how much it moves."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int32

from fourdstar_jax.data.gltf import Asset, Clip, MalformedAsset
from fourdstar_jax.geometry import FOV_DEG, OCCUPANCY, RADIUS, apparent_size

MIN_MOTION = 0.01  # of the normalised unit (GVFDiffusion's filter, arXiv 2507.23785)
MIN_AREA = 0.01  # of a picture: an object smaller than that in any frame is hardly seen
ROOT_MOTION = 0.5  # of the object's longest side: a path that leads farther is taken away
MARGIN = 0.48  # of the picture's side, from its middle: no vertex is farther out in a rig's view


class Sequence(NamedTuple):
    """F frames of a clip at `frame / fps` seconds after its first key, normalised."""

    positions: Float32[np.ndarray, "F P 3"]
    normals: Float32[np.ndarray, "F P 3"]
    motion: float  # largest over the frames: mean distance of the vertices from frame 0
    room: float  # how many times as large it could be and still be whole in its rig's pictures


class Tracked(NamedTuple):
    """Points that stay at their place on their triangle."""

    points: Float32[np.ndarray, "F N 3"]
    normals: Float32[np.ndarray, "F N 3"]  # of the triangles, unit length; 0 of those without area


def track(
    positions: Float32[np.ndarray, "F P 3"],
    triangles: Int32[np.ndarray, "M 3"],
    count: int,
    rng: np.random.Generator,
) -> Tracked:
    """`count` points of the surface, drawn evenly over its area at the first frame.

    All triangles count, those inside the object as well. Raises `MalformedAsset` for a surface
    without area.
    """
    areas = np.linalg.norm(_crosses(positions[0], triangles), axis=-1)
    if not areas.sum() > 0:
        raise MalformedAsset("its triangles have no area at the first frame")
    chosen = triangles[rng.choice(len(triangles), count, p=areas / areas.sum())]
    root, share = np.sqrt(rng.random(count)), rng.random(count)
    places = np.stack([1 - root, root * (1 - share), root * share], axis=-1)  # barycentric
    points = np.einsum("fnvc,nv->fnc", positions[:, chosen], places)
    normals = np.stack([_crosses(frame, chosen) for frame in positions])
    lengths = np.linalg.norm(normals, axis=-1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    return Tracked(points.astype(np.float32), normals.astype(np.float32))


def _crosses(
    positions: Float32[np.ndarray, "P 3"], triangles: Int32[np.ndarray, "M 3"]
) -> Float[np.ndarray, "M 3"]:
    """Normals as long as twice the triangles' areas."""
    a, b, c = np.moveaxis(positions[triangles].astype(np.float64), 1, 0)
    return np.cross(b - a, c - a)


def num_frames(clip: Clip, fps: float, max_frames: int) -> int:
    """Frames at 0, 1/fps, ... strictly before the clip's end, at least one.

    The end is left out because the last key of a cycle repeats the first: frame F is frame 0.
    """
    return max(1, min(max_frames, int(np.ceil(clip.duration_s * fps - 1e-6))))


def sample_clip(
    asset: Asset, clip: Clip, *, fps: float, max_frames: int, turn_deg: float = 0.0
) -> Sequence:
    """Poses the frames of a clip, takes its root motion away and puts it in its place.

    The object is turned about the y axis first, by `turn_deg` from the left to the front.

    `motion` is measured before root motion is taken away. Raises `MalformedAsset` when the
    vertices have no extent or a pose is not finite.
    """
    F = num_frames(clip, fps, max_frames)
    posed = asset.pose(clip.index, np.arange(F) / fps)
    assert posed.normals is not None
    positions, normals = posed.positions, posed.normals
    if turn_deg:
        cos, sin = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
        turn = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]], np.float32)
        positions, normals = positions @ turn.T, normals @ turn.T
    size = float(np.median(np.ptp(positions, axis=1).max(axis=1)))
    path = positions.mean(axis=1, dtype=np.float64)  # [F, 3]
    root = np.zeros_like(path)
    for axes in ([0, 2], [1]):  # over the ground; up and down
        root[:, axes] = root_motion(path[:, axes], size)
    still = (positions - root[:, None]).astype(np.float32)
    side = float(np.ptp(still, axis=(0, 1)).max())
    if not 1e-30 < side < 1e30:
        raise MalformedAsset(f"clip {clip.name!r} has a bounding box of side {side}")
    center, scale, room = placing(still)
    moved = np.linalg.norm(positions - positions[:1], axis=-1).mean(axis=1).max() * scale
    placed = ((still - center) * scale).astype(np.float32)
    return Sequence(placed, normals, float(moved), room)


def varied(sequence: Sequence, zoom: float, shift: Float[np.ndarray, " 3"]) -> Sequence:
    """Scaled by `zoom`, at most its room, then moved by `shift`, in sides of the rig's pictures.

    By less where one of the rig's pictures would not show all of it.
    """
    widest, room = 2 * np.tan(np.deg2rad(FOV_DEG) / 2), sequence.room / zoom
    # Whole is |across| + MARGIN * widest * ahead below the first product (`placing`).
    most = MARGIN * widest * RADIUS * max(1 - 1 / room, 0) / (1 + MARGIN * widest)
    aside = np.clip(shift * widest * RADIUS, -most, most)
    positions = (sequence.positions * zoom + aside).astype(np.float32)
    return sequence._replace(positions=positions, room=room)


def root_motion(path: Float[np.ndarray, "F N"], size: float) -> Float[np.ndarray, "F N"]:
    """The part of an object's path that is to be taken away: all if it leads far, else zeros."""
    path = path - path[0]
    far = np.linalg.norm(np.ptp(path, axis=0)) > ROOT_MOTION * size * (1 + 1e-3)
    return path if far else np.zeros_like(path)


def placing(
    positions: Float32[np.ndarray, "F P 3"],
) -> tuple[Float[np.ndarray, " 3"], float, float]:
    """The middle of the box over all frames, the scale at which to see it, and the room left.

    At that scale its apparent size (`geometry.apparent_size`) in the pictures of a rig of four is
    OCCUPANCY on average, or less where one of the pictures could not show all of it.
    """
    low, high = positions.min(axis=(0, 1)), positions.max(axis=(0, 1))
    center = (low + high) / 2
    views = []  # a turn by a quarter each: to the right, up and ahead of the axis
    x, y, z = np.moveaxis(positions - center, -1, 0)
    for right, ahead in ((x, z), (-z, x), (-x, -z), (z, -x)):
        views.append((right, y, ahead))
    widest = 2 * np.tan(np.deg2rad(FOV_DEG) / 2)  # what a picture shows at a distance of one
    room = min(
        MARGIN * widest * RADIUS / (np.abs(across) + MARGIN * widest * ahead).max()
        for *both, ahead in views
        for across in both
    )
    scale = OCCUPANCY / float((high - low).max())
    for _ in range(4):  # nearer parts grow faster than the scale
        sizes = []
        for right, up, ahead in views:
            seen = widest * np.maximum(RADIUS - scale * ahead, 0.1 * RADIUS) / scale
            sizes.append(apparent_size(float(np.ptp(right / seen)), float(np.ptp(up / seen))))
        scale *= OCCUPANCY * len(sizes) / sum(sizes)
    scale = float(min(scale, room))
    return center, scale, float(room / scale)
