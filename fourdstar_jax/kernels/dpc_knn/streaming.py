"""Density-peaks clustering one group at a time, as STAR's container runs it.

`add_group` keeps what is known of all tokens so far in `Peaks`, and `find_clusters` turns that into
clusters whenever they are wanted. Exact: the result is that of a run over all groups at once, but
for rounding: this takes the features as they are, where the other centres them first. Those of
STAR are normalised, so that their distances are not small beside their lengths.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.dpc_knn.reference import (
    Peaks,
    distances,
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
) -> Peaks:
    """Takes one more group of tokens into the peaks.

    Densities never change, being of one group each, so delta is a running minimum. Memory and time
    grow with S times N, not with S squared. Rows that are not finite count as masked out.
    """
    x, mask = usable_rows(x.astype(peaks.x.dtype), mask)
    start = peaks.filled
    new = start + jnp.arange(x.shape[0])
    density = log_densities(distances(x, x, ids, ids), mask, k=k)

    def write(buffer, rows):
        return jax.lax.dynamic_update_slice_in_dim(buffer, rows, start, axis=0)

    ids = ids.astype(peaks.ids.dtype)
    xs, all_ids, valid = write(peaks.x, x), write(peaks.ids, ids), write(peaks.mask, mask)
    densities = write(peaks.log_densities, density)
    index = jnp.arange(xs.shape[0])
    distance = distances(xs, x, all_ids, ids)  # [S, N], every slot to the new group
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
