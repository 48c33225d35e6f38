"""Density-peaks clustering one group at a time, as STAR's container runs it.

`add_group` keeps what is known of all tokens so far in `Peaks`, and `find_clusters` turns that into
clusters whenever they are wanted: decoding. In training all groups are there: `clusters_before`
gives the same for all of them in a few large steps. Exact: the result is that of a run over all
groups at once, but for rounding: this takes the features as they are, where the other centres them
first. Those of STAR are normalised, so that their distances are not small beside their lengths.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.dpc_knn.reference import (
    Clusters,
    Peaks,
    distances,
    find_clusters,
    is_denser,
    log_densities,
    usable_rows,
)


def empty_peaks(num_slots: int, dim: int, num_ids: int, dtype: DTypeLike = jnp.float32) -> Peaks:
    """The peaks before any group has come in; no array is weakly typed, as `add_group`'s are not.

    Groups are taken in at `dtype`, float32 or float64.
    """
    return Peaks(
        x=jnp.zeros((num_slots, dim), dtype),
        ids=jnp.zeros((num_slots, num_ids), jnp.int32),
        mask=jnp.zeros(num_slots, bool),
        log_densities=jnp.zeros(num_slots, dtype),
        deltas=jnp.full(num_slots, jnp.inf, dtype),
        max_distance=jnp.zeros((), dtype),
        filled=jnp.zeros((), jnp.int32),
    )


def add_group(
    peaks: Peaks,
    x: Float[Array, "N D"],
    ids: Int[Array, "N K"],
    mask: Bool[Array, " N"],
    *,
    k: int,
    rounded: DTypeLike | None = None,
) -> Peaks:
    """Takes one more group of tokens into the peaks. For `rounded` see `distances`.

    Densities never change, being of one group each, so delta is a running minimum. Memory and time
    grow with S times N, not with S squared. Rows that are not finite count as masked out.
    """
    x, mask = usable_rows(x.astype(peaks.x.dtype), mask)
    start = peaks.filled
    new = start + jnp.arange(x.shape[0])
    density = log_densities(distances(x, x, ids, ids, rounded), mask, k=k)

    def write(buffer, rows):
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)

    ids = ids.astype(peaks.ids.dtype)
    xs, all_ids, valid = write(peaks.x, x), write(peaks.ids, ids), write(peaks.mask, mask)
    densities = write(peaks.log_densities, density)
    index = jnp.arange(xs.shape[0])
    distance = distances(xs, x, all_ids, ids, rounded)  # [S, N], every slot to the new group
    pair = valid[:, None] & mask
    denser = is_denser(density, new, densities[:, None], index[:, None])
    older = ~denser & (index[:, None] != new)  # the slot is denser than the new token
    deltas = jnp.minimum(peaks.deltas, jnp.min(distance, 1, where=pair & denser, initial=jnp.inf))
    new_deltas = jnp.min(distance, 0, where=pair & older, initial=jnp.inf)
    new_deltas = jnp.minimum(jax.lax.dynamic_slice_in_dim(deltas, start, x.shape[0]), new_deltas)
    return Peaks(
        x=xs,
        ids=all_ids,
        mask=valid,
        log_densities=densities,
        deltas=write(deltas, new_deltas),
        max_distance=jnp.maximum(peaks.max_distance, jnp.max(distance, where=pair, initial=0.0)),
        filled=start + x.shape[0],
    )


def clusters_before(
    x: Float[Array, "T N D"],
    ids: Int[Array, "T N K"],
    mask: Bool[Array, "T N"],
    steps: Int[Array, " G"],
    *,
    k: int,
    num_clusters: int,
    rounded: DTypeLike | None = None,
) -> Clusters:
    """The clusters of the first s groups, for each s of `steps`; for 0 there are none.

    Each pair of groups is compared once, a group's N columns at a time. For `rounded` see
    `distances`.
    """
    timesteps, size = x.shape[:2]
    flat, valid = usable_rows(x.reshape(-1, x.shape[-1]), mask.reshape(-1))
    x, mask = flat.reshape(x.shape), valid.reshape(mask.shape)
    all_ids = ids.reshape(-1, ids.shape[-1])
    compare = functools.partial(distances, rounded=rounded)
    density = jax.lax.map(
        lambda y: log_densities(compare(y[0], y[0], y[1], y[1]), y[2], k=k), (x, ids, mask)
    )
    densities, index = density.reshape(-1), jnp.arange(flat.shape[0])

    def columns(group):
        """Of every token the distance to the nearest denser one of a group, and the largest
        distance between the group and those up to it."""
        t, x, ids, mask, density = group
        distance = compare(flat, x, all_ids, ids)  # [S, N]
        pair = valid[:, None] & mask
        number = t * size + jnp.arange(size)
        denser = is_denser(density, number, densities[:, None], index[:, None])
        delta = jnp.min(distance, 1, where=pair & denser, initial=jnp.inf)
        largest = jnp.max(distance, 1, where=pair, initial=0.0)
        return delta, jnp.max(largest, where=index < (t + 1) * size, initial=0.0)

    # The last group is in no history; where it is the only one, this is for nothing.
    groups = (jnp.arange(timesteps), x, ids, mask, density)
    groups = jax.tree.map(lambda y: y[: max(timesteps - 1, 1)], groups)
    deltas, largest = jax.lax.map(columns, groups)
    deltas, largest = jax.lax.cummin(deltas), jax.lax.cummax(largest)

    def clusters(step):
        last = jnp.maximum(step - 1, 0)
        seen = valid & (index < step * size)
        peaks = Peaks(flat, all_ids, seen, densities, deltas[last], largest[last], step * size)
        return find_clusters(peaks, num_clusters=num_clusters, rounded=rounded)

    return jax.lax.map(clusters, steps)
