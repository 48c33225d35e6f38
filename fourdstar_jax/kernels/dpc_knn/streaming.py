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
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.dpc_knn.reference import (
    Clusters,
    Peaks,
    distances,
    find_centers,
    is_denser,
    join_centers,
    log_densities,
    squared_distances,
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
    """Takes one more group of tokens into the peaks. For `rounded` see `squared_distances`.

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

    Each pair of groups is compared once, for what either is to the other: all groups with those one
    further on, then two, around the circle to its half. For `rounded` see `squared_distances`.
    """
    timesteps, size, dim = x.shape
    flat, valid = usable_rows(x.reshape(-1, dim), mask.reshape(-1))
    all_ids = ids.reshape(-1, ids.shape[-1])
    # The last group is in no history; where it is the only one, this is for nothing.
    past = max(timesteps - 1, 1)
    x, ids, mask = flat.reshape(x.shape)[:past], ids[:past], valid.reshape(mask.shape)[:past]
    if rounded is not None:
        # In multiples of 8 channels: GPUs have their fast products for rows of 16 bytes.
        x = jnp.pad(x.astype(rounded), ((0, 0), (0, 0), (0, -dim % 8)))
    compare = functools.partial(squared_distances, rounded=rounded)

    def own(group):
        """Densities, the squared distances to the nearest denser token, and the largest one."""
        x, ids, mask = group
        square = compare(x, x, ids, ids)
        density = log_densities(jnp.sqrt(square / dim), mask, k=k)
        index = jnp.arange(size)
        denser = is_denser(density, index, density[:, None], index[:, None])
        pair = mask[:, None] & mask
        nearest = jnp.min(square, 1, where=pair & denser, initial=jnp.inf)
        return density, nearest, jnp.max(square, where=pair, initial=0.0)

    density, nearest, largest = jax.lax.map(own, (x, ids, mask))
    number = np.arange(past)

    def pairs(_, offset):
        """Every group with the one `offset` after it."""
        other = (number + offset) % past
        square = jax.vmap(compare)(x, x[other], ids, ids[other])  # [P, N, N]
        pair = mask[:, :, None] & mask[other][:, None]
        first, second = density[:, :, None], density[other][:, None]
        earlier = (number < other)[:, None, None]
        denser = (first > second) | ((first == second) & earlier)  # the first of the pair
        rows = jnp.min(square, 2, where=pair & ~denser, initial=jnp.inf)
        columns = jnp.min(square, 1, where=pair & denser, initial=jnp.inf)
        return None, (rows, columns, jnp.max(jnp.max(square, 2, where=pair, initial=0.0), 1))

    half = past // 2
    _, (rows, columns, between) = jax.lax.scan(pairs, None, jnp.arange(1, half + 1))
    # [g, h]: of group g's tokens to the denser ones of group h, and between the two groups
    ahead = (number - number[:, None]) % past
    found = jnp.concatenate([nearest[None], rows, columns])
    table = found[
        np.where(ahead <= half, ahead, half + (past - ahead)),
        np.where(ahead <= half, number[:, None], number),
    ]
    most = jnp.concatenate([largest[None], between])[
        np.minimum(ahead, past - ahead), np.where(ahead <= half, number[:, None], number)
    ]
    deltas = jnp.sqrt(jax.lax.cummin(table, axis=1) / dim)
    largest = jnp.sqrt(jax.lax.cummax(jax.lax.cummax(most, axis=0), axis=1) / dim)
    index = jnp.arange(flat.shape[0])

    def whole(rows, empty):
        """Of all tokens, from those of the past groups."""
        return jnp.pad(rows.reshape(-1), (0, len(index) - past * size), constant_values=empty)

    def peaks(step):
        last = jnp.maximum(step - 1, 0)
        return Peaks(
            x=flat,
            ids=all_ids,
            mask=valid & (index < step * size),
            log_densities=whole(density, 0.0),
            deltas=whole(deltas[:, last], jnp.inf),
            max_distance=largest[last, last],
            filled=step * size,
        )

    found = jax.vmap(lambda s: find_centers(peaks(s), num_clusters=num_clusters))(steps)
    return jax.lax.map(
        lambda y: join_centers(peaks(y[0]), y[1], y[2], rounded=rounded), (steps, *found)
    )
