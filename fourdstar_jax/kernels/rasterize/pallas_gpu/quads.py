"""A warp's pixels and the list it walks: what the forward and the backward kernel share."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.rasterize.pallas_gpu.intersect import clip, reaches
from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import WARP
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import F32, GEOMETRY, NOTHING, QUAD, TILE
from fourdstar_jax.kernels.rasterize.projection import ALPHA_MAX, ALPHA_MIN


class Quad(NamedTuple):
    """Places of a warp's pixels: each lane has one at (x, y) and one at (x, y + 4)."""

    warp: Any  # 0 to 3
    lane: Any  # 0 to 31
    left: Any  # centre of the quad's first pixel
    top: Any
    x: Any  # pixel centres
    y: Any
    inside: Any  # for each of the two, whether it is in the image
    places: Any  # index of each of the two among all images' pixels
    centred_x: Any  # the quad's first pixel, relative to the tile's centre
    centred_y: Any  # the lane's upper pixel, relative to the tile's centre


def quad_of(lanes, tile, spec) -> Quad:
    """The quad of each warp of the block that owns a tile."""
    index = lanes.lanes()
    warp, lane = index >> 5, index & 31
    per_image = spec.rows * spec.columns
    image = lax.div(tile, jnp.int32(per_image))
    within = tile - image * per_image
    row = lax.div(within, jnp.int32(spec.columns))
    column = within - row * spec.columns
    left, top = (warp & 1) * QUAD, (warp >> 1) * QUAD  # in the tile
    x, y = left + (lane & 7), top + (lane >> 3)
    px, py = column * TILE + x, row * TILE + y
    inside = [(px < spec.width) & (py + 4 * h < spec.height) for h in (0, 1)]
    first = image * (spec.height * spec.width) + py * spec.width + px
    half = TILE / 2 - 0.5
    return Quad(
        warp,
        lane,
        (column * TILE + left).astype(F32) + 0.5,
        (row * TILE + top).astype(F32) + 0.5,
        px.astype(F32) + 0.5,
        py.astype(F32) + 0.5,
        inside,
        [first, first + 4 * spec.width],
        left.astype(F32) - half,
        y.astype(F32) - half,
    )


class Fetched(NamedTuple):
    """Reads of a list, ahead of their use: places two batches ahead, owners one, rows none."""

    row: Any  # of batch k
    place: Any
    owner1: Any  # of batch k + 1
    place1: Any
    place2: Any  # of batch k + 2


class List:
    """A tile's list, read in batches of 32, one Gaussian a lane."""

    def __init__(self, lanes, spec, rows, places, owners, begin, end, lane):
        self.lanes, self.spec = lanes, spec
        self.rows, self.places, self.owners = rows, places, owners
        self.begin, self.last, self.lane = begin, jnp.maximum(end - 1, 0), lane

    def _place(self, k):
        index = jnp.minimum(self.begin + k * WARP + self.lane, self.last)
        return self.lanes.gather(self.places, index)

    def _owner(self, place):
        # Past the list's end anything may stand there; in range is good enough.
        return clip(self.lanes.gather(self.owners, place), 0, self.spec.total - 1)

    def row(self, owner):
        row = []
        for k in range(0, self.spec.words, 4):
            row += self.lanes.gather(self.rows, owner * self.spec.words + k, 4)
        return tuple(row)

    def first(self) -> Fetched:
        place, place1 = self._place(0), self._place(1)
        owner, owner1 = self._owner(place), self._owner(place1)
        return Fetched(self.row(owner), place, owner1, place1, self._place(2))

    def next(self, k, fetched: Fetched) -> Fetched:
        """The reads that batch k + 1 needs; nothing here waits for another of them."""
        return Fetched(
            self.row(fetched.owner1),
            fetched.place1,
            self._owner(fetched.place2),
            fetched.place2,
            self._place(k + 3),
        )


def stage_rows(lanes, spec, quad, row, where, stage, order):
    """Lays the rows of Gaussians that reach the quad out in shared memory; returns their number.

    The places behind them are filled with rows that show nothing.
    """
    geometry = row[:GEOMETRY]
    hit = where & reaches(geometry, quad.left, quad.top)
    hits = lanes.ballot(hit)
    number = lanes.count_bits(hits)
    before = lanes.count_bits(hits & ((jnp.int32(1) << quad.lane) - 1))
    place = quad.warp * WARP + jnp.where(hit, before, number + quad.lane - before)
    words = list(row)
    words[GEOMETRY - 1] = jnp.where(hit, words[GEOMETRY - 1], NOTHING)
    everywhere = quad.lane >= 0
    lanes.warp_barrier()
    for k in range(0, spec.words, 4):
        lanes.scatter(stage, place * spec.words + k, words[k : k + 4], everywhere)
    if order is not None:
        lanes.scatter(order, place, quad.lane, everywhere)
    lanes.warp_barrier()
    return lanes.uniform(number)


def staged(lanes, spec, quad, stage, k, first, last):
    """Numbers `first` to `last` of row k of the warp's staged ones, in every lane."""
    at = (quad.warp * WARP + k) * spec.words
    numbers = []
    for j in range(first // 4 * 4, last, 4):
        numbers += lanes.gather(stage, at + j, 4)
    return numbers[first % 4 :][: last - first]


def alphas_of(quad, geometry):
    """Alpha of one Gaussian at each of a lane's two pixels, 0 under ALPHA_MIN."""
    u, v, a, b, c, log2_opacity = geometry
    dx, dy = u - quad.x, v - quad.y
    across = a * dx
    alphas = []
    for y in (dy, dy - 4.0):
        p, q = across + b * y, c * y
        alpha = jnp.minimum(jnp.exp2(log2_opacity - p * p - q * q), ALPHA_MAX)
        alphas.append(jnp.where(alpha >= ALPHA_MIN, alpha, 0.0))
    return alphas
