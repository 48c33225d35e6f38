"""Tile rasterizer for GPUs (Hopper or newer): Pallas kernels on Mosaic GPU, forward and backward.

Tiling: an image is cut into tiles of 16x16 pixels, and a block of 128 lanes owns a tile. Each of
its four warps owns a quad of 8x8 pixels, two a lane, and walks the tile's list on its own: it takes
32 Gaussians at a time, one a lane, keeps those whose ellipse of alpha >= 1/255 reaches its quad,
lays their rows out in shared memory, and blends them one after the other until its pixels are used
up.

    pack      lane = Gaussian of an image: its row of numbers, and exactly how many tiles it touches
    (sort)    Gaussians of all images by depth; a stable sort keeps the lower index in front
    expand    lane = pair: its tile and its owner, in order of the owners' depths
    (sort)    pairs by tile, stable again, so that each tile's list is in exact order of depth
    forward   warp = quad: channels and transmittance of its pixels, and how far in its list it went
    backward  block = tile, 32 Gaussians at a time: each warp sums the moments of what its pixels
              send back, five Gaussians at once through shared memory; one warp adds up the four
    gather    lane = Gaussian of an image: adds up its tiles' sums in fixed order, and turns moments
              into gradients

Nothing is added atomically: the same inputs give the same bits. What the backward pass keeps of a
(tile, Gaussian) pair lies where the tile's list says, so only pairs that the forward pass reached
take memory; if the sums of all pairs would take much, the tiles are taken in several passes.

One custom_vjp holds all kernels; the projection before it is left to autodiff. The kernel bodies
are plain Pallas on arrays of (128,) with the lane operations of lanes.py, which have their meaning
in plain JAX there as well: with `interpret=True` the same bodies run on any device, slowly.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.rasterize.lanes import LANES, WARP, launch
from fourdstar_jax.kernels.rasterize.projection import ALPHA_MAX, ALPHA_MIN, TRANSMITTANCE_MIN
from fourdstar_jax.kernels.rasterize.xla import vary_like

TILE = 16  # pixels
QUAD = 8  # pixels
WARPS = LANES // WARP
GEOMETRY = 6  # numbers a row begins with: u, v, a, b, c (scaled for base 2), log2(opacity)
MOMENTS = 6  # 1, x, y, x^2, x y, y^2
PITCH = 36  # floats from one row of partial sums to the next: 16-byte reads without bank conflicts
FORWARD_UNROLL = 4  # Gaussians that are evaluated together
BACKWARD_UNROLL = 2
GATHER_UNROLL = 2
# The backward pass takes tiles in up to so many passes if all sums together exceed these bytes.
MOST_PASSES = 4
SUMS_BYTES = 2**26

LOG2E = math.log2(math.e)
# exp(-sigma) = exp2(-(a dx + b dy)^2 - (c dy)^2) with a, b, c times this.
SCALE = math.sqrt(0.5 * LOG2E)
# An ellipse's bound has a little to spare, so that rounding never drops what is visible.
REACH = -math.log2(ALPHA_MIN) + 1e-3
MARGIN = 2e-3  # pixels
NOTHING = -1e30  # log2 of the opacity of a Gaussian that is not there

F32, I32 = jnp.float32, jnp.int32


class Inputs(NamedTuple):
    """What is blended: I images, in sets of equally many that share colours and features."""

    u: Float[Array, "I G"]  # means2d, pixels
    v: Float[Array, "I G"]
    a: Float[Array, "I G"]  # conic_roots, 1 / pixels
    b: Float[Array, "I G"]
    c: Float[Array, "I G"]
    opacities: Float[Array, "I G"]  # 0 where culled
    depths: Float[Array, "I G"]
    colors: Float[Array, "S G 3"]
    features: Float[Array, "S G F"]  # F may be 0


class Blended(NamedTuple):
    """Images of I cameras, a plane for each channel."""

    channels: Float[Array, "C I h w"]  # colours, expected depth times alpha (if asked), features
    left: Float[Array, "I h w"]  # transmittance
    num_pairs: Int[Array, "*i"]  # (tile, Gaussian) there are; of each image within this file
    overflow: Bool[Array, ""]


class Spec(NamedTuple):
    """Sizes and options of one call."""

    images: int
    gaussians: int  # of each image
    sets: int
    features: int
    with_depths: bool
    width: int  # pixels
    height: int
    capacity: int
    interpret: bool

    @property
    def columns(self):
        return -(-self.width // TILE)

    @property
    def rows(self):
        return -(-self.height // TILE)

    @property
    def tiles(self):
        return self.images * self.rows * self.columns

    @property
    def total(self):
        """Gaussians of all images."""
        return self.images * self.gaussians

    @property
    def channels(self):
        return 3 + self.with_depths + self.features

    @property
    def words(self):
        """Numbers in a row, a multiple of four: geometry, then channels."""
        return -(-(GEOMETRY + self.channels) // 4) * 4

    @property
    def sums(self):
        """Numbers that the backward pass keeps of a (tile, Gaussian) pair."""
        return MOMENTS + self.channels

    @property
    def slots(self):
        """Gaussians whose partial sums a warp reduces together, a row of lanes for each number."""
        return WARP // (3 + self.channels)

    @property
    def passes(self):
        """Passes over the tiles that the backward pass takes."""
        return min(MOST_PASSES, -(-self.capacity * self.sums * 4 // SUMS_BYTES))

    @property
    def window(self):
        """Places for sums in one pass; the last tile of a pass may go beyond."""
        return -(-self.capacity // self.passes)


def blend(inputs: Inputs, *, with_depths, width, height, capacity, interpret=False) -> Blended:
    """Blends projected Gaussians front to back; differentiable, works under jit and vmap.

    Inputs are float32. `capacity` is the number of (tile, Gaussian) pairs there is room for; where
    `overflow` is set there were more, and the images are not to be used.
    """
    inputs = Inputs(*vary_like(inputs, *inputs))
    images, gaussians = inputs.u.shape
    spec = Spec(
        images=images,
        gaussians=gaussians,
        sets=inputs.colors.shape[0],
        features=inputs.features.shape[-1],
        with_depths=with_depths,
        width=width,
        height=height,
        capacity=capacity,
        interpret=interpret,
    )
    if images % spec.sets:
        raise ValueError(f"{images=} must be a multiple of the number of sets {spec.sets}")
    if spec.tiles >= 2**31 or spec.total >= 2**31 // 4:
        raise ValueError(f"{images=} of {width}x{height} with {gaussians=} are too many at once")
    blended: Any = _blend(inputs, spec)
    return blended._replace(num_pairs=_saturating_sum(blended.num_pairs))


@functools.cache
def why_not() -> str | None:
    """Why these kernels do not run on the default device, to be read after their name."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", None)
    needs = "needs an NVIDIA GPU of compute capability 9.0 (Hopper) or newer"
    if device.platform != "gpu" or capability is None:
        return f"{needs}, and this is a {device.platform}"
    if float(capability) < 9:
        return f"{needs}, and this {device.device_kind} has {capability}"
    inputs = [_shape(1, 1)] * 7 + [_shape(1, 1, 3), _shape(1, 1, 0)]
    spec = Spec(1, 1, 1, 0, False, TILE, TILE, 128, False)
    try:
        jax.jit(lambda *x: _pack_all(Inputs(*x), spec)).trace(*inputs).lower(
            lowering_platforms=("cuda",)
        )
    except Exception as error:  # whatever another version of Pallas may say
        return f"does not fit the Pallas of jax {jax.__version__} ({error!r})"
    return None


# ---------------------------------------------------------------- which tiles a Gaussian touches


def _floor(x):
    """Of numbers that are not negative."""
    return x.astype(I32)


def _ceil(x):
    whole = x.astype(I32)
    return whole + jnp.where(whole.astype(F32) < x, 1, 0)


def _clip(x, low, high):
    return jnp.minimum(jnp.maximum(x, low), high)


def _tile_range(low, high, tiles):
    """First tile and number of tiles with pixel centres between two coordinates."""
    first = _ceil(_clip((low - MARGIN - (TILE - 0.5)) * (1 / TILE), 0.0, float(tiles)))
    last = _floor(_clip((high + MARGIN - 0.5) * (1 / TILE) + 1, 0.0, float(tiles)))
    return first, jnp.maximum(last - first, 0)


class Ellipse(NamedTuple):
    """Where alpha >= ALPHA_MIN: (a dx + b dy)^2 + (c dy)^2 <= radius2 about the mean (u, v)."""

    u: Any
    v: Any
    inverse_a: Any
    b: Any
    c: Any
    radius2: Any
    half: Any  # its height is twice this
    extreme: Any  # y of its rightmost point; minus that of its leftmost one


def _ellipse(geometry) -> tuple[Ellipse, Any]:
    """The ellipse, and whether there is one."""
    u, v, a, b, c, log2_opacity = geometry
    reach = log2_opacity + REACH
    radius2 = jnp.maximum(reach, 0.0)
    half = jnp.sqrt(radius2) / c
    extreme = -b * half / jnp.sqrt(b * b + c * c)
    return Ellipse(u, v, 1 / a, b, c, radius2, half, extreme), reach >= 0


def _tile_rows(ellipse, there, spec):
    """First row of tiles that an ellipse meets, and how many."""
    first, number = _tile_range(ellipse.v - ellipse.half, ellipse.v + ellipse.half, spec.rows)
    return first, jnp.where(there, number, 0)


def _tile_columns(ellipse, row, spec):
    """First tile of a row of tiles that the ellipse meets, and how many.

    The ellipse is convex, so its part within the row has an interval of x, and it meets the tiles
    that meet the interval. Its ends lie at vertical tangents of the ellipse or at the row's edges.
    """
    e = ellipse
    top = row.astype(F32) * TILE + 0.5 - e.v
    low, high = _clip(top, -e.half, e.half), _clip(top + (TILE - 1), -e.half, e.half)
    ends = []
    for sign in (-1.0, 1.0):
        y = _clip(sign * e.extreme, low, high)
        across = jnp.sqrt(jnp.maximum(e.radius2 - (e.c * y) * (e.c * y), 0.0))
        ends.append(e.u + (sign * across - e.b * y) * e.inverse_a)
    return _tile_range(ends[0], ends[1], spec.columns)


def _reaches(geometry, left, top):
    """Whether the ellipse meets a quad whose first pixel centre is (left, top)."""
    u, v, a, b, c, log2_opacity = geometry
    x0, y0 = left - u, top - v
    x1, y1 = x0 + (QUAD - 1), y0 + (QUAD - 1)
    # The nearest point is on the edge that faces the mean in x, or on the one in y.
    x, y = _clip(0.0, x0, x1), _clip(0.0, y0, y1)
    along_y = _clip(-a * b * x / (b * b + c * c), y0, y1)
    along_x = _clip(-b * y / a, x0, x1)

    def exponent(x, y):
        p, q = a * x + b * y, c * y
        return p * p + q * q

    nearest = jnp.minimum(exponent(x, along_y), exponent(along_x, y))
    return nearest <= log2_opacity + REACH


def _pack(lanes, block, spec, u, v, a, b, c, opacities, depths, colors, *rest):
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

    ellipse, there = _ellipse(geometry)
    first, number = _tile_rows(ellipse, there, spec)
    most = lanes.uniform(lanes.warp_max(number))

    def add_row(k, count):
        _, across = _tile_columns(ellipse, first + k, spec)
        return count + jnp.where(k < number, across, 0)

    count = _while_less(most, add_row, lanes.full(0, I32))
    lanes.scatter(counts, i, count, live)


def _while_less(bound, body, init):
    """A loop over k = 0, 1, ... under a bound that only the warp knows."""
    _, out = lax.while_loop(
        lambda x: x[0] < bound, lambda x: (x[0] + 1, body(x[0], x[1])), (jnp.int32(0), init)
    )
    return out


def _expand(
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
    ellipse, there = _ellipse(words[:GEOMETRY])
    first_row, number = _tile_rows(ellipse, there, spec)
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
            next_first, across = _tile_columns(ellipse, row + 1, spec)
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
    _while_less(lanes.uniform(number), some, (lanes.full(-1, I32), none, none, none, none))


# ---------------------------------------------------------------- blending


class Quad(NamedTuple):
    """Where a warp's pixels lie: each lane has one at (x, y) and one at (x, y + 4)."""

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


def _quad(lanes, tile, spec) -> Quad:
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


class _List:
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
        return _clip(self.lanes.gather(self.owners, place), 0, self.spec.total - 1)

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


def _stage(lanes, spec, quad, row, where, stage, order):
    """Lays the rows of Gaussians that reach the quad out in shared memory; returns their number.

    The places behind them are filled with rows that show nothing.
    """
    geometry = row[:GEOMETRY]
    hit = where & _reaches(geometry, quad.left, quad.top)
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


def _staged(lanes, spec, quad, stage, k, first, last):
    """Numbers `first` to `last` of row k of the warp's staged ones, in every lane."""
    at = (quad.warp * WARP + k) * spec.words
    numbers = []
    for j in range(first // 4 * 4, last, 4):
        numbers += lanes.gather(stage, at + j, 4)
    return numbers[first % 4 :][: last - first]


def _alphas(quad, geometry):
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


def _forward_kernel(lanes, tile, spec, rows, places, owners, begins, ends, planes, reached, stage):
    """Blends a tile's list; `planes` are the channels of all images, transmittance last."""
    quad = _quad(lanes, tile, spec)
    begin, end = begins[tile], ends[tile]
    reads = _List(lanes, spec, rows, places, owners, begin, end, quad.lane)
    zero = lanes.full(0.0)
    one = lanes.full(1.0)

    def blend_one(k, state):
        running, left, totals = ([*x] for x in state)
        row = _staged(lanes, spec, quad, stage, k, 0, GEOMETRY + spec.channels)
        alphas = _alphas(quad, row[:GEOMETRY])
        totals = [[*x] for x in totals]
        for h in (0, 1):
            # `running` is the transmittance until a pixel ends, then 0 for good.
            after = running[h] - running[h] * alphas[h]
            goes_on = after > TRANSMITTANCE_MIN
            weight = jnp.where(goes_on, running[h] * alphas[h], 0.0)
            running[h] = jnp.where(goes_on, after, 0.0)
            left[h] = jnp.where(goes_on, after, left[h])
            for c in range(spec.channels):
                totals[h][c] += weight * row[GEOMETRY + c]
        return tuple(running), tuple(left), tuple(tuple(x) for x in totals)

    def batch(carry):
        k, _, fetched, state = carry
        ahead = reads.next(k, fetched)
        listed = begin + k * WARP + quad.lane < end
        number = _stage(lanes, spec, quad, fetched.row, listed, stage, None)

        def some(carry):
            j, _, state = carry
            for n in range(FORWARD_UNROLL):
                state = blend_one(j + n, state)
            return j + FORWARD_UNROLL, alive(state[0]), state

        _, going, state = lax.while_loop(
            lambda x: (x[0] < number) & (x[1] != 0), some, (jnp.int32(0), alive(state[0]), state)
        )
        return k + 1, going, ahead, state

    def alive(running):
        return lanes.some((running[0] > 0) | (running[1] > 0))

    running = tuple(jnp.where(x, one, 0.0) for x in quad.inside)
    totals = ((zero,) * spec.channels,) * 2
    state = (running, (one, one), totals)
    k, _, _, state = lax.while_loop(
        lambda x: (begin + x[0] * WARP < end) & (x[1] != 0),
        batch,
        (jnp.int32(0), alive(running), reads.first(), state),
    )
    _, left, totals = state
    pixels = spec.images * spec.height * spec.width
    for h in (0, 1):
        for c, value in enumerate([*totals[h], left[h]]):
            lanes.scatter(planes, c * pixels + quad.places[h], value, quad.inside[h])
    far = jnp.minimum(k * WARP, end - begin) + lanes.full(0, I32)
    lanes.scatter(reached, tile * WARPS + quad.warp, far, quad.lane == 0)


def _backward_kernel(
    lanes,
    tile,
    spec,
    lows,
    rows,
    places,
    begins,
    reached,
    bases,
    cotangents,
    rest,
    owners,
    sums,
    stage,
    order,
    partial,
    warp_sums,
    warp_bits,
):
    """Sums of a tile's pixels for each Gaussian of its list, to places from `bases[tile]` - low on.

    `rest` is what a pixel's cotangent makes of everything it shows. `owners[place]` of a pair
    becomes minus one minus the address of its sums where there is something to add.
    """
    quad = _quad(lanes, tile, spec)
    begin, base, low = begins[tile], bases[tile], lows[0]
    here = (base >= low) & (base < low + spec.window)
    mine = lanes.gather(reached, tile * WARPS + quad.warp)  # places of the list that the warp went
    far = jnp.int32(0)
    for w in range(WARPS):
        far = jnp.maximum(far, reached[tile * WARPS + w])
    far = jnp.where(here, far, 0)
    reads = _List(lanes, spec, rows, places, owners, begin, begin + far, quad.lane)
    pixels = spec.images * spec.height * spec.width
    safe = [jnp.where(inside, p, 0) for inside, p in zip(quad.inside, quad.places, strict=True)]

    def read(ref, h, c=0):
        return jnp.where(quad.inside[h], lanes.gather(ref, c * pixels + safe[h]), 0.0)

    cotangent = [[read(cotangents, h, c) for c in range(spec.channels)] for h in (0, 1)]
    zero = lanes.full(0.0)
    no_int = lanes.full(0, I32)
    centred_y = [quad.centred_y, quad.centred_y + 4.0]

    def flush(parity, filled, packed, bits):
        """Adds up the lanes of up to `slots` Gaussians, and their moments in x."""
        lanes.warp_barrier()
        number = lax.div(quad.lane, jnp.full_like(quad.lane, spec.slots))
        slot = quad.lane - number * spec.slots
        columns = [zero] * QUAD
        for i in range(WARP // QUAD):
            at = (quad.warp * WARP + quad.lane) * PITCH + QUAD * i
            values = lanes.gather(partial, at, 4) + lanes.gather(partial, at + 4, 4)
            columns = [p + q for p, q in zip(columns, values, strict=True)]
        moments = [zero] * 3
        for i, value in enumerate(columns):
            x = quad.centred_x + float(i)
            once = value * x
            moments = [p + q for p, q in zip(moments, (value, once, once * x), strict=True)]
        staged = (packed >> (5 * slot)) & 31
        index = lanes.gather(order, quad.warp * WARP + staged)
        at = ((parity * WARPS + quad.warp) * WARP + index) * spec.sums
        used = (slot < filled) & (number < 3 + spec.channels)
        # Rows 0, 1, 2 hold the sums over y times 1, y, y^2; the others those of channels.
        first = jnp.where(number == 0, 0, jnp.where(number == 1, 2, number + 3))
        lanes.scatter(warp_sums, at + jnp.where(used, first, 0), moments[0], used)
        second = jnp.where(number == 0, 1, 4)
        lanes.scatter(warp_sums, at + second, moments[1], used & (number < 2))
        lanes.scatter(warp_sums, at + 3, moments[2], used & (number == 0))
        lanes.warp_barrier()
        return no_int, no_int, bits | lanes.warp_or(jnp.where(used, jnp.int32(1) << index, 0))

    def send_back(j, alphas, contributes, parity, state):
        """Adds one Gaussian's partial sums to the warp's buffer."""
        # Read again: registers are scarce.
        channels = _staged(lanes, spec, quad, stage, j, GEOMETRY, GEOMETRY + spec.channels)
        through, behind, filled, packed, bits = state
        through, behind = [*through], [*behind]
        slopes, weights = [], []
        for h in (0, 1):
            q = zero
            for c in range(spec.channels):
                q += cotangent[h][c] * channels[c]
            weight = through[h] * alphas[h]
            shown = weight * q
            through[h] = through[h] - weight
            behind[h] = behind[h] - shown
            slope = shown - behind[h] * (alphas[h] / (1.0 - alphas[h]))
            slopes.append(jnp.where(alphas[h] < ALPHA_MAX, slope, 0.0))  # else the clamp hides it
            weights.append(weight)
        once = [y * s for y, s in zip(centred_y, slopes, strict=True)]
        values = [
            slopes[0] + slopes[1],
            once[0] + once[1],
            centred_y[0] * once[0] + centred_y[1] * once[1],
        ]
        for c in range(spec.channels):
            values.append(weights[0] * cotangent[0][c] + weights[1] * cotangent[1][c])
        everywhere = quad.lane >= 0
        for n, value in enumerate(values):
            at = (quad.warp * WARP + n * spec.slots + filled) * PITCH + quad.lane
            lanes.scatter(partial, at, value, everywhere)
        packed = jnp.where(contributes, packed | (j << (5 * filled)), packed)
        filled = jnp.where(contributes, filled + 1, filled)
        full = lanes.uniform(filled) == spec.slots
        buffered = flush_if(full, parity, filled, packed, bits)
        return tuple(through), tuple(behind), *buffered

    def flush_if(condition, parity, *buffered):
        return lax.cond(condition, lambda *b: flush(parity, *b), lambda *b: b, *buffered)

    def some(parity, carry):
        j, running, state = carry
        running = [*running]
        group, mask = [], no_int
        for n in range(BACKWARD_UNROLL):
            alphas = _alphas(quad, _staged(lanes, spec, quad, stage, j + n, 0, GEOMETRY))
            for h in (0, 1):
                after = running[h] - running[h] * alphas[h]
                goes_on = after > TRANSMITTANCE_MIN
                alphas[h] = jnp.where(goes_on, alphas[h], 0.0)
                running[h] = jnp.where(goes_on, after, 0.0)
            mask = jnp.where(alphas[0] + alphas[1] > 0, mask | (1 << n), mask)
            group.append(alphas)
        mask = lanes.warp_or(mask)
        for n, alphas in enumerate(group):
            state = lax.cond(
                lanes.uniform((mask >> n) & 1) != 0,
                lambda *s, n=n, alphas=alphas: send_back(
                    j + n, alphas, (mask >> n) & 1 != 0, parity, s
                ),
                lambda *s: s,
                *state,
            )
        return j + BACKWARD_UNROLL, tuple(running), state

    def add_warps(k, parity, fetched):
        """One lane a Gaussian: the four warps' sums about its mean, from those about the tile."""
        where = k * WARP + quad.lane < far
        total, any_bits = [zero] * spec.sums, no_int
        for w in range(WARPS):
            bits = lanes.gather(warp_bits, parity * WARPS + w + no_int)
            bit = (bits >> quad.lane) & 1
            at = ((parity * WARPS + w) * WARP + quad.lane) * spec.sums
            for n in range(spec.sums):
                total[n] = total[n] + jnp.where(bit != 0, lanes.gather(warp_sums, at + n), 0.0)
            any_bits = any_bits | bit
        m, mx, my, mxx, mxy, myy, *channels = total
        # Mean minus the tile's centre; the quad's first pixel tells where that is.
        x = fetched.row[0] - (quad.left - quad.centred_x)
        y = fetched.row[1] - (quad.top - (quad.warp >> 1).astype(F32) * QUAD + 7.5)
        sx, sy = x * m - mx, y * m - my
        moved = [m, sx, sy, x * (sx - mx) + mxx, x * sy - y * mx + mxy, y * (sy - my) + myy]
        where = where & (any_bits != 0) & (quad.warp == (k & 3))
        address = base + k * WARP + quad.lane
        for n, value in enumerate(moved + channels):
            lanes.scatter(sums, (address - low) * spec.sums + n, value, where)
        lanes.scatter(owners, fetched.place, -1 - address, where)

    def batch(carry):
        k, fetched, running, through, behind = carry
        parity = k & 1
        ahead = reads.next(k, fetched)
        listed = k * WARP + quad.lane < mine
        number = _stage(lanes, spec, quad, fetched.row, listed, stage, order)
        state = (through, behind, no_int, no_int, no_int)
        _, running, state = lax.while_loop(
            lambda x: x[0] < number,
            functools.partial(some, parity),
            (jnp.int32(0), running, state),
        )
        through, behind, filled, packed, bits = state
        _, _, bits = flush_if(lanes.uniform(filled) > 0, parity, filled, packed, bits)
        lanes.scatter(warp_bits, parity * WARPS + quad.warp, bits, quad.lane == 0)
        # Two buffers take turns, so one barrier a batch is enough.
        lanes.block_barrier()
        turn = lanes.uniform(jnp.where(quad.warp == (k & 3), 1, 0))

        @functools.partial(_when, turn != 0)
        def _():
            add_warps(k, parity, fetched)

        return k + 1, ahead, running, through, behind

    one = lanes.full(1.0)
    running = tuple(jnp.where(x, one, 0.0) for x in quad.inside)
    behind = tuple(read(rest, h) for h in (0, 1))
    lax.while_loop(
        lambda x: x[0] * WARP < far,
        batch,
        (jnp.int32(0), reads.first(), running, (one, one), behind),
    )


def _when(condition, body):
    lax.cond(condition, lambda: (body(), None)[1], lambda: None)


def _gather_kernel(
    lanes, block, spec, first, rows, counts, begins, window, sums, owners, gradients
):
    """Adds up each Gaussian's sums of a pass and turns them into gradients, plane by plane.

    `window` has the addresses of the pass's first and last sums, and where the pass's places begin.
    """
    low, high, base = window[0], window[1], window[2]

    def work():
        index = block * LANES + lanes.lanes()
        live = index < spec.total
        i = jnp.minimum(index, spec.total - 1)
        begin = lanes.gather(begins, i)
        count = jnp.where(live, lanes.gather(counts, i), 0)
        count = jnp.where(begin < 0, 0, jnp.minimum(count, spec.capacity - begin))
        zero = lanes.full(0.0)

        def add(k, total):
            k = k * GATHER_UNROLL
            places = [jnp.where(k + n < count, begin + k + n, 0) for n in range(GATHER_UNROLL)]
            # Read together: each read of a sum waits for one of these.
            addresses = [-1 - lanes.gather(owners, place) for place in places]
            for n, address in enumerate(addresses):
                found = (k + n < count) & (address >= low) & (address < high)
                at = jnp.where(found, address - base, 0) * spec.sums
                total = tuple(
                    t + jnp.where(found, lanes.gather(sums, at + m), 0.0)
                    for m, t in enumerate(total)
                )
            return total

        most = lanes.uniform(lanes.warp_max(count + (GATHER_UNROLL - 1)))
        most = lax.div(most, jnp.int32(GATHER_UNROLL))
        m, sx, sy, sxx, sxy, syy, *channels = _while_less(most, add, (zero,) * spec.sums)
        words = lanes.gather(rows, i * spec.words, 4) + lanes.gather(rows, i * spec.words + 4, 4)
        a, b, c = (x * (1 / SCALE) for x in words[2:5])
        # The moments are of the slope in log(alpha) = log(opacity) - sigma.
        p, q = a * sx + b * sy, c * c * sy
        planes = [
            -a * p,
            -(b * p + q),
            -(a * sxx + b * sxy),
            -(a * sxy + b * syy),
            -c * syy,
            m * jnp.exp2(-words[5]),
            *channels,
        ]
        # A Gaussian that shows nothing has no opacity to divide by.
        planes[5] = jnp.where(words[5] + REACH >= 0, planes[5], 0.0)
        for n, value in enumerate(planes):
            at = n * spec.total + i
            if not first:
                value += lanes.gather(gradients, at)
            lanes.scatter(gradients, at, value, live)

    # The first pass writes even if there is nothing to add.
    _when((low <= high) if first else (low < high), work)


# ---------------------------------------------------------------- kernels and sorts put together


def _shape(*shape, dtype=F32):
    return jax.ShapeDtypeStruct(shape, dtype)


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass; flat, each a multiple of the images."""

    rows: Any
    counts: Any
    begins: Any  # first place of each Gaussian's pairs
    owners: Any
    places: Any  # in order of tiles
    tile_begins: Any
    reached: Any
    planes: Any


def _cumsum(x):
    return jnp.cumsum(x, dtype=I32)


def _saturating_sum(x):
    """Over the last axis, at most the largest int32."""
    most = jnp.iinfo(I32).max
    total = jnp.sum(x.astype(F32), axis=-1)
    return jnp.where(total > 2.0**31 - 2**16, most, jnp.sum(x, axis=-1, dtype=I32))


def _pack_all(inputs: Inputs, spec: Spec):
    return launch(
        _pack,
        list(inputs if spec.features else inputs[:-1]),
        outputs=[_shape(spec.total * spec.words), _shape(spec.total, dtype=I32)],
        grid=-(-spec.total // LANES),
        static=(spec,),
        interpret=spec.interpret,
    )


def _run_forward(inputs: Inputs, spec: Spec) -> tuple[Blended, Kept]:
    run = functools.partial(launch, interpret=spec.interpret)
    blocks = -(-spec.total // LANES)
    rows, counts = _pack_all(inputs, spec)
    # Depths are positive, so their bits are in their order.
    depths = lax.bitcast_convert_type(inputs.depths.reshape(-1), jnp.uint32)
    depths = jnp.where(counts > 0, depths, jnp.uint32(2**32 - 1))
    (index,) = vary_like(inputs, lax.iota(I32, spec.total))
    _, order = lax.sort((depths, index), num_keys=1, is_stable=True)
    ordered = counts[order]
    stops = _cumsum(ordered)
    num_pairs = _saturating_sum(counts.reshape(spec.images, -1))

    key_type = jnp.uint16 if spec.tiles < 2**16 - 1 else jnp.uint32
    keys = jnp.full(spec.capacity, jnp.iinfo(key_type).max, key_type)
    keys = jax.new_ref(vary_like(inputs, keys)[0])
    owners, begins = run(
        _expand,
        [rows, order, stops - ordered, stops],
        refs=[keys],
        outputs=[_shape(spec.capacity, dtype=I32), _shape(spec.total, dtype=I32)],
        scratch=[_shape(LANES * 8), _shape(LANES, dtype=I32), _shape(LANES * 4, dtype=I32)],
        grid=blocks,
        static=(spec,),
    )
    (slots,) = vary_like(inputs, lax.iota(I32, spec.capacity))
    keys, places = lax.sort((jax.freeze(keys), slots), num_keys=1, is_stable=True)
    tile_ids = lax.iota(key_type, spec.tiles)
    tile_begins = jnp.searchsorted(keys, tile_ids, method="scan_unrolled").astype(I32)
    end = jnp.minimum(stops[-1:], spec.capacity)
    # Not slices of one array: kernels take aligned buffers only.
    tile_ends = jnp.concatenate([tile_begins[1:], end])
    pixels = spec.images * spec.height * spec.width
    planes, reached = run(
        _forward_kernel,
        [rows, places, owners, tile_begins, tile_ends],
        outputs=[_shape((spec.channels + 1) * pixels), _shape(spec.tiles * WARPS, dtype=I32)],
        scratch=[_shape(LANES * spec.words)],
        grid=spec.tiles,
        static=(spec,),
    )
    kept = Kept(rows, counts, begins, owners, places, tile_begins, reached, planes)
    planes = planes.reshape(-1, spec.images, spec.height, spec.width)
    overflow = _saturating_sum(num_pairs) > spec.capacity
    return Blended(planes[:-1], planes[-1], num_pairs, overflow), kept


def _run_backward(kept: Kept, cotangent: Blended, spec: Spec) -> Inputs:
    run = functools.partial(launch, interpret=spec.interpret)
    planes = kept.planes.reshape(spec.channels + 1, spec.images, spec.height, spec.width)
    rest = jnp.sum(cotangent.channels * planes[:-1], axis=0) + cotangent.left * planes[-1]
    longest = jnp.max(kept.reached.reshape(-1, WARPS), axis=1)
    ends = _cumsum(longest)
    bases = ends - longest
    lows = jnp.arange(spec.passes, dtype=I32) * spec.window
    firsts = jnp.min(jnp.where(bases >= lows[:, None], bases, ends[-1]), axis=1)
    lasts = jnp.concatenate([firsts[1:], ends[-1:]])
    # A tile's list holds a Gaussian once at most.
    room = spec.window + min(spec.gaussians, spec.capacity)
    owners = jax.new_ref(kept.owners)

    @jax.jit  # passes share one kernel
    def sums_of(low):
        return run(
            _backward_kernel,
            [
                low,
                kept.rows,
                kept.places,
                kept.tile_begins,
                kept.reached,
                bases,
                cotangent.channels,
                rest,
            ],
            refs=[owners],
            outputs=[_shape(room * spec.sums)],
            scratch=[
                _shape(LANES * spec.words),
                _shape(LANES, dtype=I32),
                _shape(LANES * PITCH),
                _shape(2 * LANES * spec.sums),
                _shape(2 * WARPS, dtype=I32),
            ],
            grid=spec.tiles,
            static=(spec,),
        )[0]

    def gather(number, sums, refs, outputs):
        window = jnp.stack([firsts[number], lasts[number], lows[number]])
        return run(
            _gather_kernel,
            [kept.rows, kept.counts, kept.begins, window, sums],
            refs=refs,
            outputs=outputs,
            grid=-(-spec.total // LANES),
            static=(spec, number == 0),
        )

    # The first pass writes the gradients, the others add to them.
    shape = _shape(spec.sums * spec.total)
    (gradients,) = gather(0, sums_of(jnp.zeros(1, I32)), [owners], [shape])
    gradients = jax.new_ref(gradients)
    for number in range(1, spec.passes):
        low = jnp.full(1, number * spec.window, I32)
        gather(number, sums_of(low), [owners, gradients], [])
    planes = jax.freeze(gradients).reshape(spec.sums, spec.images, spec.gaussians)
    geometry, channels = planes[:GEOMETRY], planes[GEOMETRY:]
    depths = channels[3] if spec.with_depths else jnp.zeros_like(geometry[0])
    channels = channels.reshape(-1, spec.sets, spec.images // spec.sets, spec.gaussians)
    shared = jnp.moveaxis(jnp.sum(channels, axis=2), 0, -1)  # [S, G, C]
    u, v, a, b, c, opacities = geometry
    colors, features = shared[..., :3], shared[..., 3 + spec.with_depths :]
    return Inputs(u, v, a, b, c, opacities, depths, colors, features)


# ---------------------------------------------------------------- gradients and vmap


def _folding(run):
    """`run(*arrays, spec)` with a vmap rule: the mapped axis becomes more images of one call."""

    @functools.cache
    def for_spec(spec):
        mapped = jax.custom_batching.custom_vmap(lambda *arrays: run(*arrays, spec))

        @mapped.def_vmap
        def rule(size, batched, *arrays):
            def join(x, is_batched):
                x = x if is_batched else jnp.broadcast_to(x, (size, *x.shape))
                axis = _images_axis(x.ndim - 1)
                x = jnp.moveaxis(x, 0, axis)
                return x.reshape(
                    *x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :]
                )

            def split(x):
                if not x.ndim:
                    return jnp.broadcast_to(x, (size,))
                axis = _images_axis(x.ndim)
                x = x.reshape(*x.shape[:axis], size, x.shape[axis] // size, *x.shape[axis + 1 :])
                return jnp.moveaxis(x, axis, 0)

            more = spec._replace(
                images=size * spec.images, sets=size * spec.sets, capacity=size * spec.capacity
            )
            joined = jax.tree.map(join, arrays, tuple(batched))
            out = jax.tree.map(split, for_spec(more)(*joined))
            return out, jax.tree.map(lambda _: True, out)

        return mapped

    return lambda *arrays_and_spec: for_spec(arrays_and_spec[-1])(*arrays_and_spec[:-1])


def _images_axis(ndim):
    """Where the images are in an array of `Inputs`, `Kept` or `Blended`: second among channels'."""
    return 1 if ndim == 4 else 0


_forward, _backward = _folding(_run_forward), _folding(_run_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _blend(inputs: Inputs, spec: Spec) -> Blended:
    return _forward(inputs, spec)[0]


def _blend_fwd(inputs, spec):
    return _forward(inputs, spec)


def _blend_bwd(spec, kept, cotangent):
    floats = cotangent._replace(num_pairs=None, overflow=None)
    return (_backward(kept, floats, spec),)


_blend.defvjp(_blend_fwd, _blend_bwd)
