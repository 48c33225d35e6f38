"""Which tiles a Gaussian touches: the kernels `pack` and `expand`, and the geometry they share.

Tiling: a lane owns a Gaussian of an image in `pack`; in `expand` a warp owns 32 Gaussians, in order
of depth, and its lanes take their (tile, Gaussian) pairs one each.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import LANES, WARP, while_less
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import (
    F32,
    GEOMETRY,
    I32,
    MARGIN,
    NOTHING,
    QUAD,
    REACH,
    SCALE,
    TILE,
)


def floor(x):
    """The floor, as int32, of numbers that are not negative."""
    return x.astype(I32)


def ceil(x):
    """The ceiling, as int32, of numbers that are not negative."""
    whole = x.astype(I32)
    return whole + jnp.where(whole.astype(F32) < x, 1, 0)


def clip(x, low, high):
    """`x` between two bounds, either of which may differ between lanes."""
    return jnp.minimum(jnp.maximum(x, low), high)


def tile_range(low, high, tiles):
    """First tile and number of tiles with pixel centres between two coordinates."""
    first = ceil(clip((low - MARGIN - (TILE - 0.5)) * (1 / TILE), 0.0, float(tiles)))
    last = floor(clip((high + MARGIN - 0.5) * (1 / TILE) + 1, 0.0, float(tiles)))
    return first, jnp.maximum(last - first, 0)


class Ellipse(NamedTuple):
    """The region of alpha >= ALPHA_MIN: (a dx + b dy)^2 + (c dy)^2 <= radius2 about (u, v)."""

    u: Any
    v: Any
    inverse_a: Any
    b: Any
    c: Any
    radius2: Any
    half: Any  # its height is twice this
    extreme: Any  # y of its rightmost point; minus that of its leftmost one


def ellipse_of(geometry) -> tuple[Ellipse, Any]:
    """The ellipse of a row's geometry, and whether there is one."""
    u, v, a, b, c, log2_opacity = geometry
    reach = log2_opacity + REACH
    radius2 = jnp.maximum(reach, 0.0)
    half = jnp.sqrt(radius2) / c
    extreme = -b * half / jnp.sqrt(b * b + c * c)
    return Ellipse(u, v, 1 / a, b, c, radius2, half, extreme), reach >= 0


def tile_rows(ellipse, there, spec):
    """First row of tiles that an ellipse meets, and how many."""
    first, number = tile_range(ellipse.v - ellipse.half, ellipse.v + ellipse.half, spec.rows)
    return first, jnp.where(there, number, 0)


def tile_columns(ellipse, row, spec):
    """First tile of a row of tiles that the ellipse meets, and how many.

    The ellipse is convex, so its part within the row has an interval of x, and it meets the tiles
    that meet the interval. Its ends lie at vertical tangents of the ellipse or at the row's edges.
    """
    e = ellipse
    top = row.astype(F32) * TILE + 0.5 - e.v
    low, high = clip(top, -e.half, e.half), clip(top + (TILE - 1), -e.half, e.half)
    ends = []
    for sign in (-1.0, 1.0):
        y = clip(sign * e.extreme, low, high)
        across = jnp.sqrt(jnp.maximum(e.radius2 - (e.c * y) * (e.c * y), 0.0))
        ends.append(e.u + (sign * across - e.b * y) * e.inverse_a)
    return tile_range(ends[0], ends[1], spec.columns)


def reaches(geometry, left, top):
    """Tells whether the ellipse meets a quad whose first pixel centre is (left, top)."""
    u, v, a, b, c, log2_opacity = geometry
    x0, y0 = left - u, top - v
    x1, y1 = x0 + (QUAD - 1), y0 + (QUAD - 1)
    # The nearest point is on the edge that faces the mean in x, or on the one in y.
    x, y = clip(0.0, x0, x1), clip(0.0, y0, y1)
    along_y = clip(-a * b * x / (b * b + c * c), y0, y1)
    along_x = clip(-b * y / a, x0, x1)

    def exponent(x, y):
        p, q = a * x + b * y, c * y
        return p * p + q * q

    nearest = jnp.minimum(exponent(x, along_y), exponent(along_x, y))
    return nearest <= log2_opacity + REACH


def pack(lanes, block, spec, u, v, a, b, c, opacities, depths, colors, *rest):
    """Writes each Gaussian's row of numbers and the number of tiles that it touches."""
    *features, rows, counts = rest
    index = block * LANES + lanes.lanes()
    live = index < spec.total
    i = jnp.minimum(index, spec.total - 1)
    geometry = [lanes.gather(ref, i) for ref in (u, v, a, b, c)]
    geometry = geometry[:2] + [x * SCALE for x in geometry[2:]]
    geometry.append(jnp.maximum(jnp.log2(lanes.gather(opacities, i)), NOTHING))

    # Images of a set share channels.
    image = lax.div(i, jnp.full_like(i, spec.gaussians))
    of_set = lax.div(image, jnp.full_like(i, spec.images // spec.sets)) * spec.gaussians
    j = of_set + i - image * spec.gaussians
    channels = [lanes.gather(colors, j * 3 + k) for k in range(3)]
    if spec.with_depths:
        channels.append(lanes.gather(depths, i))
    channels += [lanes.gather(features[0], j * spec.features + k) for k in range(spec.features)]

    words = geometry + channels
    words += [jnp.zeros_like(words[0])] * (spec.words - len(words))
    for k in range(0, spec.words, 4):
        lanes.scatter(rows, i * spec.words + k, words[k : k + 4], live)

    ellipse, there = ellipse_of(geometry)
    first, number = tile_rows(ellipse, there, spec)
    most = lanes.uniform(lanes.warp_max(number))

    def add_row(k, count):
        _, across = tile_columns(ellipse, first + k, spec)
        return count + jnp.where(k < number, across, 0)

    count = while_less(most, add_row, lanes.full(0, I32))
    lanes.scatter(counts, i, count, live)


def expand(
    lanes, block, spec, rows, order, starts, stops, keys, owners, begins, stage, firsts, owned
):
    """Writes tile number and owner of each pair, in order of the owners' depths.

    A warp owns 32 Gaussians, whose pairs have places one after the other, and takes 32 places at a
    time, one a lane: what it writes is contiguous.
    """
    index = lanes.lanes()
    warp, lane = index >> 5, index & 31
    rank = block * LANES + index
    live = rank < spec.total
    rank = jnp.minimum(rank, spec.total - 1)
    i = lanes.gather(order, rank)
    start, stop = lanes.gather(starts, rank), lanes.gather(stops, rank)
    lanes.scatter(begins, i, start, live)
    words = lanes.gather(rows, i * spec.words, 4) + lanes.gather(rows, i * spec.words + 4, 4)
    ellipse, there = ellipse_of(words[:GEOMETRY])
    first_row, number = tile_rows(ellipse, there, spec)
    everywhere = index >= 0
    lanes.scatter(stage, index * 8, ellipse[:4], everywhere)
    lanes.scatter(stage, index * 8 + 4, ellipse[4:], everywhere)
    lanes.scatter(firsts, index, jnp.where(live, start, spec.capacity), everywhere)
    image = lax.div(i, jnp.full_like(i, spec.gaussians))
    # The first tile of an image, counted from its row 0: what a row and a column are added to.
    whole = [first_row, first_row + number, image * (spec.rows * spec.columns), i]
    lanes.scatter(owned, index * 4, whole, everywhere)
    lanes.warp_barrier()
    # The first lane knows where the warp's places begin, the last live one where they end.
    begin = lanes.gather(firsts, warp * WARP)
    end = lanes.warp_max(jnp.where(live, stop, 0))
    end = jnp.minimum(jnp.where(begin < 0, 0, end), spec.capacity)

    def some(k, state):
        who, row, row_begin, row_end, first = state
        place = begin + k * WARP + lane
        active = place < end
        # The last of the warp's Gaussians that begins at or before this place.
        found = lanes.full(0, I32)
        for step in (16, 8, 4, 2, 1):
            ahead = lanes.gather(firsts, warp * WARP + found + step)
            found = jnp.where(ahead <= place, found + step, found)
        at = warp * WARP + found
        ellipse = Ellipse(*lanes.gather(stage, at * 8, 4), *lanes.gather(stage, at * 8 + 4, 4))
        first_row, last_row, first_tile, owner = lanes.gather(owned, at * 4, 4)
        within = place - lanes.gather(firsts, at)
        # The same Gaussian as before goes on from the row where it was.
        new = found != who
        row = jnp.where(new, first_row - 1, row)
        row_begin, row_end = (jnp.where(new, 0, x) for x in (row_begin, row_end))

        def behind(row, row_end):
            return active & (within >= row_end) & (row + 1 < last_row)

        def advance(x):
            _, row, row_begin, row_end, first = x
            go = behind(row, row_end)
            next_first, across = tile_columns(ellipse, row + 1, spec)
            row = jnp.where(go, row + 1, row)
            row_begin = jnp.where(go, row_end, row_begin)
            row_end = jnp.where(go, row_end + across, row_end)
            first = jnp.where(go, next_first, first)
            return lanes.some(behind(row, row_end)), row, row_begin, row_end, first

        _, row, row_begin, row_end, first = lax.while_loop(
            lambda x: x[0] != 0,
            advance,
            (lanes.some(behind(row, row_end)), row, row_begin, row_end, first),
        )
        tile = first_tile + row * spec.columns + first + within - row_begin
        # Both kernels count alike; if the compiler ever rounded one of them otherwise, by a tile
        # that is not visible, the place that was counted for it goes to no tile.
        tile = jnp.where(within < row_end, tile, -1)
        lanes.scatter(keys, place, tile, active)
        lanes.scatter(owners, place, owner, active)
        return found, row, row_begin, row_end, first

    none = lanes.full(0, I32)
    number = lanes.warp_max((end - begin + WARP - 1) >> 5)
    while_less(lanes.uniform(number), some, (lanes.full(-1, I32), none, none, none, none))
