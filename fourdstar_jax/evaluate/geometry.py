"""Geometry over time: how near Gaussians stay to the true surface, and whether they move with it.

The distances of ActionBench (ActionMesh, arXiv:2601.16148; actionbench/ of its repository): Chamfer
distances are means of nearest distances, both ways added up, not squared.

    CD-3D  the mean over frames, each aligned by itself: shape
    CD-4D  the mean over frames, all aligned as the first one: shape and where it goes
    CD-M   pairs are the nearest at the first frame, aligned; the mean of their distances over all
           frames, both ways added up: motion

It differs so: points are the centres of opaque Gaussians, where ActionBench draws 100,000 evenly
from a mesh; the truth has as many points as its data set; a frame is aligned by closest points with
a turn, a shift and one scale (Umeyama 1991), where ActionBench descends a gradient over a scale for
each axis, too. Both try 24 turns, ours most of them with few points.
"""

import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64
from scipy.spatial import KDTree

OPAQUE = 0.5  # opacity of a Gaussian that counts as surface
F_DISTANCE = 0.02  # scene units within which a point counts as found; an object is about 0.8 high
ALIGNED_BY = 2000  # points, at most
ITERATIONS = 40
# Points that are to tell which starts are good, and how many of these go on with all: a fifth of
# the time, for Chamfer distances that are 0.1 % larger on average where a shape is ambiguous.
SKETCHED_BY = 400
FINISHED = 6


class Similarity(NamedTuple):
    """x -> scale * rotation @ x + shift."""

    scale: float
    rotation: Float64[np.ndarray, "3 3"]
    shift: Float64[np.ndarray, " 3"]

    def __call__(self, points: Float[np.ndarray, "*b 3"]) -> Float64[np.ndarray, "*b 3"]:
        return self.scale * points @ self.rotation.T + self.shift

    def inverse(self, points: Float[np.ndarray, "*b 3"]) -> Float64[np.ndarray, "*b 3"]:
        """What the similarity brings to `points`; far away where it brings all to one."""
        return (points - self.shift) @ self.rotation / max(self.scale, 1e-12)


IDENTITY = Similarity(1.0, np.eye(3), np.zeros(3))


def chamfer(first: Float[np.ndarray, "n 3"], second: Float[np.ndarray, "m 3"]) -> float:
    """Mean distance to the nearest point of the other set, both ways added up."""
    return sum(float(d.mean()) for d in _nearest(first, second))


def f_score(
    points: Float[np.ndarray, "n 3"], truth: Float[np.ndarray, "m 3"], distance: float = F_DISTANCE
) -> float:
    """Harmonic mean of the shares of both sets that lie within `distance` of the other."""
    precision, recall = (float((d < distance).mean()) for d in _nearest(points, truth))
    return 2 * precision * recall / max(precision + recall, 1e-12)


def motion_chamfer(first: Float[np.ndarray, "T n 3"], second: Float[np.ndarray, "T m 3"]) -> float:
    """Mean distance over time of the pairs that are nearest at the first frame, both ways."""
    total = 0.0
    for points, other in ((first, second), (second, first)):
        partners = KDTree(other[0]).query(points[0])[1]
        total += float(np.linalg.norm(points - other[:, partners], axis=-1).mean())
    return total


def _nearest(first, second) -> tuple[np.ndarray, np.ndarray]:
    """Distances of each point to the other set: [n], [m]."""
    return KDTree(second).query(first)[0], KDTree(first).query(second)[0]


def align(
    points: Float[np.ndarray, "n 3"],
    truth: Float[np.ndarray, "m 3"],
    *,
    starts: tuple[Similarity, ...] = (),
) -> Similarity:
    """The turn, shift and scale that brings points nearest to the truth, by closest points.

    From `starts`, or from 24 turns by right angles about the middle; the best end is kept. With a
    start that is good, the identity alone, points in place stay where they are. Of many starts only
    those go on with all points that a few points end best from.
    """
    points, truth = (np.asarray(x, np.float64) for x in (points, truth))
    starts = starts or tuple(_right_angles(points, truth))
    if len(starts) > FINISHED:
        few = _thinned(points, SKETCHED_BY), _thinned(truth, SKETCHED_BY)
        ends = [_closest(*few, start, ITERATIONS // 2)[0] for start in starts]
        starts = tuple(starts[i] for i in np.argsort(ends, kind="stable")[:FINISHED])
    points, truth = (_thinned(x, ALIGNED_BY) for x in (points, truth))
    ends = [_closest(points, truth, start, ITERATIONS) for start in starts]
    return min(ends, key=lambda end: end[0])[1]


def _closest(points, truth, found: Similarity, iterations: int) -> tuple[float, Similarity]:
    """Where closest points lead from a start, and the Chamfer distance there."""
    of_truth, of_points = KDTree(truth), KDTree(points)
    for _ in range(iterations):
        moved = found(points)
        there = truth[of_truth.query(moved)[1]]
        # a similarity keeps what is nearest, so that the points' tree serves wherever they are
        back = points[of_points.query(found.inverse(truth))[1]]
        new = umeyama(np.concatenate([points, back]), np.concatenate([there, truth]))
        done = np.abs(new(points) - moved).max() < 1e-7
        found = new
        if done:
            break
    return chamfer(found(points), truth), found


def umeyama(points: Float[np.ndarray, "n 3"], truth: Float[np.ndarray, "n 3"]) -> Similarity:
    """The least squares of pairs (Umeyama 1991); a rotation, never a mirror."""
    a, b = points.mean(axis=0), truth.mean(axis=0)
    x, y = points - a, truth - b
    u, sizes, vt = np.linalg.svd(y.T @ x)
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt)) or 1.0])
    rotation = u @ np.diag(signs) @ vt
    spread = np.square(x).sum()
    scale = float((sizes * signs).sum() / spread) if spread > 0 else 1.0
    return Similarity(scale, rotation, b - scale * rotation @ a)


def _right_angles(points, truth):
    """The 24 turns that take axes to axes, with the sets' middles and sizes made equal."""
    a, b = points.mean(axis=0), truth.mean(axis=0)
    size = np.sqrt(np.square(points - a).sum(axis=1).mean())
    scale = float(np.sqrt(np.square(truth - b).sum(axis=1).mean()) / size) if size > 0 else 1.0
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1.0, -1.0), repeat=3):
            rotation = np.eye(3)[list(order)] * np.array(signs)[:, None]
            if np.linalg.det(rotation) > 0:
                yield Similarity(scale, rotation, b - scale * rotation @ a)


def _thinned(points: np.ndarray, most: int) -> np.ndarray:
    if len(points) <= most:
        return points
    return points[np.random.default_rng(0).permutation(len(points))[:most]]


class NoSurface(ValueError):
    """Gaussians that no shape can be measured of."""


def measure(
    means: Float[np.ndarray, "T G 3"],
    opacities: Float[np.ndarray, "T G"],
    truth: Float[np.ndarray, "T2 N 3"],
) -> dict[str, float]:
    """cd_3d, cd_4d, cd_m and f_score of an object, in scene units.

    Raises ValueError where the counts of frames differ, NoSurface where a frame has no opaque
    Gaussians.
    """
    if len(means) != len(truth):
        raise ValueError(f"{len(means)} frames of Gaussians, {len(truth)} of true points")
    opaque = opacities > OPAQUE
    for t in np.flatnonzero(opaque.sum(axis=1) < 3):
        raise NoSurface(f"frame {t}: fewer than 3 Gaussians are opaque (above {OPAQUE})")
    sets = [m[o] for m, o in zip(means, opaque, strict=True)]
    # in place or turned: what was made here stands as its truth does
    first = align(sets[0], truth[0], starts=(IDENTITY, *_right_angles(sets[0], truth[0])))
    own = [first]
    for points, true in zip(sets[1:], truth[1:], strict=True):
        own.append(align(points, true, starts=(first, own[-1])))
    frames = list(zip(sets, truth, own, strict=True))
    return {
        "cd_3d": float(np.mean([chamfer(a(x), true) for x, true, a in frames])),
        "cd_4d": float(np.mean([chamfer(first(x), true) for x, true, _ in frames])),
        "cd_m": motion_chamfer(first(means[:, opaque[0]]), truth),
        "f_score": float(np.mean([f_score(first(x), true) for x, true, _ in frames])),
    }
