"""Lists, for every tile of every image, the Gaussians that may touch it, front to back.

All shapes are static. Either of two routes makes the same lists:

- dense: a table of (tile, Gaussian) hits, compacted by one cumulative sum and one scatter. Nothing
  is sorted but depths, and nothing can overflow; for small problems, where the table is small.
- sorted: each Gaussian writes one key for each tile it touches, and one single-key sort brings
  them together. Memory follows the capacity; more pairs than that are reported, not hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fourdstar_jax.kernels.rasterize.projection import Projected
from fourdstar_jax.kernels.rasterize.tiles import Grid

# Tables up to this many (tile, Gaussian) entries take the dense route.
DENSE_LIMIT = 2**22
# A traced call without a capacity and with larger tables makes room for this many pairs for each
# Gaussian and image, but for no fewer than TRACED_PAIRS_LEAST in all.
TRACED_PAIRS_PER_GAUSSIAN = 16
TRACED_PAIRS_LEAST = 2**20
MAX_PAIRS = 2**31 - 2**16  # a count of more than these is the largest int32, and overflows


class Bins(NamedTuple):
    """Lists of all images' tiles: tile t owns `ids[offsets[t]:offsets[t + 1]]`, front to back."""

    ids: Int[Array, " capacity"]  # image * G + Gaussian
    offsets: Int[Array, " tiles_plus_1"]
    num_pairs: Int[Array, ""]  # all that there are, whether or not they fitted
    overflow: Bool[Array, ""]


def default_capacity(images: int, gaussians: int, grid: Grid) -> int:
    """Room for every pair there could be if that is little, else a multiple of the Gaussians."""
    most = images * grid.columns * grid.rows * gaussians
    if most <= DENSE_LIMIT:
        return most
    wanted = max(TRACED_PAIRS_LEAST, TRACED_PAIRS_PER_GAUSSIAN * images * gaussians)
    return min(most, wanted, MAX_PAIRS)


def pick_capacity(num_intersections: int, current: int | None = None) -> int:
    """A capacity for the next steps, from the count of the last one (not traced).

    Capacities come from a ladder with steps of 1.25, so that a training compiles few of them.
    `current` is kept while it holds the count and is not four times too large; otherwise the answer
    has at least a tenth to spare. Call it again whenever `overflow` is set.
    """
    count = int(num_intersections)
    if current is not None and count <= current <= max(4 * count, 1024):
        return current
    capacity = 1024
    while capacity < 1.1 * count:
        capacity = -(-capacity * 5 // 4 // 1024) * 1024
    return capacity


def _spans(projected: Projected, grid: Grid):
    """First tile and number of tiles whose pixel centres the box meets, in x and in y."""
    spans = []
    for axis, tiles in ((0, grid.columns), (1, grid.rows)):
        centre, radius = projected.means2d[..., axis], projected.radii[..., axis]
        low = jnp.ceil((centre - radius - grid.tile + 0.5) / grid.tile)
        high = jnp.floor((centre + radius - 0.5) / grid.tile) + 1
        low, high = (jnp.clip(x, 0, tiles).astype(jnp.int32) for x in (low, high))
        spans.append((low, jnp.where(radius > 0, jnp.maximum(high - low, 0), 0)))
    return spans


def saturating_sum(x: Int[Array, "..."], axis: int | None = None) -> Int[Array, "*rest"]:
    """The sum of numbers that are not negative, at most the largest int32.

    Capacities are below that, so a sum that left the range of int32 overflows any of them.
    """
    too_many = jnp.sum(x.astype(jnp.float32), axis=axis) > MAX_PAIRS
    most = jnp.iinfo(jnp.int32).max
    return jnp.where(too_many, most, jnp.sum(x, axis=axis, dtype=jnp.int32))


def count_pairs(projected: Projected, grid: Grid) -> Int[Array, ""]:
    """The number of (Gaussian, tile) pairs, at most the largest int32."""
    (_, nx), (_, ny) = _spans(projected, grid)
    return saturating_sum(nx * ny)


def depth_order(projected: Projected) -> Int[Array, "I G"]:
    """Indices front to back; equal depths keep the lower one in front, culled ones go last."""
    keys = jnp.where(projected.radii[..., 0] > 0, projected.depths, jnp.inf)
    index = jax.lax.broadcasted_iota(jnp.int32, keys.shape, 1)
    return jax.lax.sort((keys, index), dimension=1, num_keys=1, is_stable=True)[1]


def bin_gaussians(projected: Projected, grid: Grid, capacity: int) -> Bins:
    """Makes the tiles' lists; `projected` holds I images of G Gaussians each."""
    images, num = projected.depths.shape
    projected = jax.lax.stop_gradient(projected)
    order = depth_order(projected)
    means2d, radii = (
        jnp.take_along_axis(x, order[..., None], axis=1)
        for x in (projected.means2d, projected.radii)
    )
    ordered = projected._replace(means2d=means2d, radii=radii)
    ids = (order + jnp.arange(images, dtype=jnp.int32)[:, None] * num).reshape(-1)
    if images * grid.columns * grid.rows * num <= DENSE_LIMIT:
        return _bin_dense(ordered, ids, grid, capacity)
    return _bin_sorted(ordered, ids, grid, capacity)


def _bin_dense(ordered: Projected, ids: Int[Array, " IG"], grid: Grid, capacity: int) -> Bins:
    images, num = ordered.depths.shape
    tiles = grid.columns * grid.rows
    (x0, nx), (y0, ny) = _spans(ordered, grid)
    column = jnp.arange(grid.columns, dtype=jnp.int32)[:, None]
    row = jnp.arange(grid.rows, dtype=jnp.int32)[:, None]
    in_x = (column >= x0[:, None]) & (column < (x0 + nx)[:, None])  # [I, columns, G]
    in_y = (row >= y0[:, None]) & (row < (y0 + ny)[:, None])  # [I, rows, G]
    hits = (in_y[:, :, None] & in_x[:, None]).reshape(-1)  # [I * tiles * G]
    ends = jnp.cumsum(hits, dtype=jnp.int32)
    slots = jnp.where(hits, ends - 1, capacity)
    owners = jnp.broadcast_to(ids.reshape(images, 1, num), (images, tiles, num)).reshape(-1)
    lists = jnp.zeros(capacity, jnp.int32).at[slots].set(owners, mode="drop")
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[num - 1 :: num]])
    count = ends[-1]
    return Bins(lists, jnp.minimum(offsets, capacity), count, count > capacity)


def _bin_sorted(ordered: Projected, ids: Int[Array, " IG"], grid: Grid, capacity: int) -> Bins:
    images, num = ordered.depths.shape
    tiles = images * grid.columns * grid.rows
    (x0, nx), (y0, ny) = ((a.reshape(-1), b.reshape(-1)) for a, b in _spans(ordered, grid))
    count = count_pairs(ordered, grid)
    ends = jnp.cumsum(nx * ny, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    # Slot s belongs to the last Gaussian that starts at or before s.
    marks = jnp.zeros(capacity, jnp.int32).at[starts].add(1, mode="drop")
    owner = jnp.clip(jnp.cumsum(marks) - 1, 0, images * num - 1)  # [capacity]
    slot = jnp.arange(capacity, dtype=jnp.int32)
    step = slot - starts[owner]
    across = jnp.maximum(nx[owner], 1)
    column, row = x0[owner] + step % across, y0[owner] + step // across
    tile = (owner // num * grid.rows + row) * grid.columns + column
    tile = jnp.where(slot < count, tile, tiles)
    if (tiles + 1) * num < 2**32:  # tile and rank in depth fit one key, nothing travels with it
        key = tile.astype(jnp.uint32) * num + (owner % num).astype(jnp.uint32)
        key = jax.lax.sort(key)
        tile = (key // num).astype(jnp.int32)
        owner = tile // (grid.rows * grid.columns) * num + (key % num).astype(jnp.int32)
        owner = jnp.minimum(owner, images * num - 1)
    else:  # owners are in order of depth within an image, and the sort keeps it
        tile, owner = jax.lax.sort((tile, owner), num_keys=1, is_stable=True)
    lengths = jnp.zeros(tiles + 1, jnp.int32).at[tile + 1].add(1, mode="drop")
    offsets = jnp.cumsum(lengths, dtype=jnp.int32)
    return Bins(ids[owner], offsets, count, count > capacity)
