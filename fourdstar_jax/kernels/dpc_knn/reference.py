"""The definition of density-peaks clustering (DPC-KNN), from the whole matrix of distances.

Du et al. 2016 as TCFormer (github.com/zengwang430521/TCFormer) uses it on tokens, with the paper's
Eq. 1 and 2: the density rho of a token is measured inside its own group, its delta is the distance
to the nearest denser token of any group, and the tokens with the largest rho * delta are centres.

Everything here is deterministic. Of two tokens of equal density the one with the smaller index
counts as denser (TCFormer adds noise instead), and tokens with equal ids are at a distance of
exactly 0, which the product form of the distance would only give up to rounding.
Densities are kept as logarithms: the order is the same and nothing underflows.
Numbers are float32, or float64 where x is. One sample at a time; who calls it maps over the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

MOST_PASSES = 8  # over the distances in search of the k nearest; else they are sorted


class Clusters(NamedTuple):
    """Centres, best first, and the cluster of every token."""

    centers: Int[Array, "*b M"]  # index of the centre token
    valid: Bool[Array, "*b M"]  # False: surplus, the centre repeats a better one or is masked out
    assignment: Int[Array, "*b L"]  # cluster of each token, -1 where masked out


class Peaks(NamedTuple):
    """The tokens of some groups in S slots, with densities and deltas; empty slots are masked."""

    x: Float[Array, "*b S D"]
    ids: Int[Array, "*b S K"]
    mask: Bool[Array, "*b S"]
    log_densities: Float[Array, "*b S"]
    deltas: Float[Array, "*b S"]  # infinite for the densest token
    max_distance: Float[Array, "*b"]  # over all pairs so far
    filled: Int[Array, ""]  # how many slots are taken


def squared_distances(
    x: Float[Array, "L D"],
    y: Float[Array, "R D"],
    x_ids: Int[Array, "L K"],
    y_ids: Int[Array, "R K"],
    rounded: DTypeLike | None = None,
) -> Float[Array, "L R"]:
    """Squared Euclidean distances, not divided by D; exactly 0 between equal ids.

    With `rounded`, bfloat16 say, they are those of the features rounded to that type: matrix units
    then multiply exactly and add in float32.
    """
    if rounded is None:
        product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    else:
        x, y = x.astype(rounded), y.astype(rounded)
        product = jnp.matmul(x, y.T, preferred_element_type=jnp.float32)
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    square = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1) - 2 * product
    same = jnp.ones(square.shape, bool)
    for k in range(x_ids.shape[1]):  # a loop, so that no [L, R, K] array is made
        same &= x_ids[:, None, k] == y_ids[:, k]
    return jnp.where(same, 0.0, jnp.maximum(square, 0.0))


def distances(
    x: Float[Array, "L D"],
    y: Float[Array, "R D"],
    x_ids: Int[Array, "L K"],
    y_ids: Int[Array, "R K"],
    rounded: DTypeLike | None = None,
) -> Float[Array, "L R"]:
    """Euclidean distances divided by sqrt(D). For `rounded` see `squared_distances`."""
    return jnp.sqrt(squared_distances(x, y, x_ids, y_ids, rounded) / x.shape[1])


def usable_rows(
    x: Float[Array, "L D"], mask: Bool[Array, " L"]
) -> tuple[Float[Array, "L D"], Bool[Array, " L"]]:
    """The mask without rows that hold a NaN or an infinity, and x with zeros where it is False."""
    mask = mask & jnp.all(jnp.isfinite(x), axis=1)
    return jnp.where(mask[:, None], x, 0.0), mask


def centred(
    x: Float[Array, "L D"], mask: Bool[Array, " L"]
) -> tuple[Float[Array, "L D"], Float[Array, ""]]:
    """x about its mean in units of its extent, and that unit, a power of two.

    The product form of the distance loses what is small beside the distance from the origin, and
    squares leave the range of the type long before their roots. What `mask` leaves out is 0.
    """

    def unit_of(x):
        largest = jnp.max(jnp.abs(x), initial=0.0)
        return jnp.where(largest > 0, largest / (2 * jnp.frexp(largest)[0]), 1.0)

    first = unit_of(x)
    x = x / first
    count = jnp.maximum(jnp.sum(mask), 1).astype(x.dtype)
    x = jnp.where(mask[:, None], x - jnp.sum(x, axis=0) / count, 0.0)
    second = unit_of(x)
    return x / second, first * second


def log_densities(
    distance: Float[Array, "N N"], mask: Bool[Array, " N"], *, k: int
) -> Float[Array, " N"]:
    """Minus the mean squared distance to the k nearest tokens, the token itself being one.

    A group with fewer than k valid tokens averages over those it has.
    """
    distance, k = jnp.where(mask, distance, jnp.inf), min(k, mask.shape[0])
    if k > MOST_PASSES:
        nearest = -jax.lax.top_k(-distance, k)[0]
        found = jnp.isfinite(nearest)
        total = jnp.sum(jnp.where(found, nearest, 0.0) ** 2, axis=1)
        return -total / jnp.maximum(jnp.sum(found, axis=1), 1).astype(total.dtype)
    # Nothing is sorted: the smallest distance, as often as it is there, then the next one.
    total, left = jnp.zeros_like(distance[:, 0]), jnp.full(distance.shape[0], k)
    least = jnp.full_like(total, -1.0)
    for _ in range(k):
        least = jnp.min(jnp.where(distance > least[:, None], distance, jnp.inf), axis=1)
        found = jnp.isfinite(least)
        times = jnp.where(found, jnp.sum(distance == least[:, None], axis=1), 0)
        times = jnp.minimum(times, left)
        total += times.astype(total.dtype) * jnp.where(found, least, 0.0) ** 2
        left -= times
    return -total / jnp.maximum(k - left, 1).astype(total.dtype)


def is_denser(
    log_density: Float[Array, "*b"],
    index: Int[Array, "*b"],
    other: Float[Array, "*c"],
    other_index: Int[Array, "*c"],
) -> Bool[Array, "*d"]:
    """Compares by density, then by the smaller index: whether the first is the denser one."""
    return (log_density > other) | ((log_density == other) & (index < other_index))


def find_centers(peaks: Peaks, *, num_clusters: int) -> tuple[Int[Array, " M"], Bool[Array, " M"]]:
    """The tokens with the largest rho * delta, best first, and which of them are no surplus.

    The densest token's delta is the largest distance of the sample. A centre with delta 0 has a
    denser twin: it is surplus.
    """
    deltas = jnp.where(jnp.isinf(peaks.deltas), peaks.max_distance, peaks.deltas)
    densest = peaks.mask & jnp.isinf(peaks.deltas)
    # With all tokens alike every delta is 0: the densest one is still a centre.
    score = peaks.log_densities + jnp.log(jnp.where(densest, jnp.maximum(deltas, 1e-30), deltas))
    score, centers = jax.lax.top_k(jnp.where(peaks.mask, score, -jnp.inf), num_clusters)
    return centers, score > -jnp.inf


def join_centers(
    peaks: Peaks,
    centers: Int[Array, " M"],
    valid: Bool[Array, " M"],
    *,
    rounded: DTypeLike | None = None,
) -> Clusters:
    """For each token the nearest centre; a centre belongs to its own cluster.

    What is not valid takes no tokens. For `rounded` see `squared_distances`.
    """
    distance = distances(peaks.x, peaks.x[centers], peaks.ids, peaks.ids[centers], rounded)
    assignment = jnp.argmin(jnp.where(valid, distance, jnp.inf), axis=1)  # of [S, M]
    own = jnp.where(valid, centers, peaks.x.shape[0])  # what is not valid falls out
    number = jnp.arange(centers.shape[0], dtype=assignment.dtype)
    assignment = assignment.at[own].set(number, mode="drop")
    return Clusters(centers, valid, jnp.where(peaks.mask, assignment, -1))


def find_clusters(peaks: Peaks, *, num_clusters: int, rounded: DTypeLike | None = None) -> Clusters:
    """Takes the tokens with the largest rho * delta as centres, for each token the nearest one.

    See `find_centers` and `join_centers`.
    """
    return join_centers(peaks, *find_centers(peaks, num_clusters=num_clusters), rounded=rounded)


def cluster(
    x: Float[Array, "L D"],
    ids: Int[Array, "L K"],
    mask: Bool[Array, " L"],
    *,
    num_clusters: int,
    k: int,
    num_groups: int,
) -> Clusters:
    """Clusters the tokens of all groups at once: slow and complete.

    Works on `centred` features; rho depends on their scale, which returns for it. Where rho would
    underflow for most tokens, the definition says nothing: the sample's extent is then the unit.
    """
    size = x.shape[0] // num_groups
    x, mask = usable_rows(x, mask)
    x, unit = centred(x, mask)
    distance = distances(x, x, ids, ids)
    blocks = distance.reshape(num_groups, size, num_groups, size)
    own = jnp.arange(num_groups)
    density = jax.vmap(lambda d, m: log_densities(d, m, k=k))(
        blocks[own, :, own, :], mask.reshape(num_groups, size)
    ).reshape(-1)
    index = jnp.arange(x.shape[0])
    pair = mask[:, None] & mask
    denser = is_denser(density, index, density[:, None], index[:, None])  # column over row
    told = mask & (density * unit * unit > jnp.log(jnp.finfo(x.dtype).tiny))
    told = 2 * jnp.sum(told) >= jnp.sum(mask)
    unit = jnp.where(told & (2.0**-60 < unit) & (unit < 2.0**60), unit, 1.0)
    peaks = Peaks(
        x=x * unit,
        ids=ids,
        mask=mask,
        log_densities=density * unit * unit,
        deltas=jnp.min(distance, 1, where=pair & denser, initial=jnp.inf) * unit,
        max_distance=jnp.max(distance, where=pair, initial=0.0) * unit,
        filled=jnp.int32(x.shape[0]),
    )
    return find_clusters(peaks, num_clusters=num_clusters)
