"""The backward kernel: for each Gaussian of a tile's list, sums of what the pixels send back.

Tiling: a block owns a tile and takes its list 32 Gaussians at a time. Each warp sums the moments of
its own quad's pixels, of several Gaussians at once through shared memory; a lane a Gaussian then
adds up the four warps' sums. Two buffers of those take turns.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import WARP, when
from fourdstar_jax.kernels.rasterize.pallas_gpu.quads import (
    Fetched,
    List,
    Quad,
    alphas_of,
    quad_of,
    stage_rows,
    staged,
)
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import (
    BACKWARD_UNROLL,
    F32,
    GEOMETRY,
    I32,
    PITCH,
    QUAD,
    WARPS,
    Spec,
)
from fourdstar_jax.kernels.rasterize.projection import ALPHA_MAX, TRANSMITTANCE_MIN


class Warp(NamedTuple):
    """What a warp works with, the same for all of its tile's list."""

    lanes: Any
    spec: Spec
    quad: Quad
    far: Any  # how far in the list the furthest of the four warps went
    base: Any  # address of the tile's first sums, and of the pass's
    low: Any
    cotangent: Any  # of each channel at each of a lane's two pixels
    centred_y: Any  # of those two, relative to the tile's centre
    zero: Any  # in every lane
    no_int: Any
    # Global memory
    owners: Any
    sums: Any
    # Shared memory
    stage: Any  # rows of the batch's Gaussians that reach the quad
    order: Any  # their places in the batch
    partial: Any  # lanes' sums of up to `spec.slots` Gaussians
    warp_sums: Any  # sums of the batch's Gaussians, two buffers
    warp_bits: Any  # of which of them a warp has any, two buffers


class Buffered(NamedTuple):
    """Gaussians whose lanes' sums lie in `Warp.partial`, and which of the batch have sums."""

    filled: Any  # how many
    packed: Any  # their places among the staged ones, five bits each
    bits: Any


def backward_kernel(
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
    quad = quad_of(lanes, tile, spec)
    begin, base, low = begins[tile], bases[tile], lows[0]
    here = (base >= low) & (base < low + spec.window)
    mine = lanes.gather(reached, tile * WARPS + quad.warp)  # places of the list that the warp went
    far = jnp.int32(0)
    for w in range(WARPS):
        far = jnp.maximum(far, reached[tile * WARPS + w])
    far = jnp.where(here, far, 0)
    reads = List(lanes, spec, rows, places, owners, begin, begin + far, quad.lane)
    pixels = spec.images * spec.height * spec.width
    safe = [jnp.where(inside, p, 0) for inside, p in zip(quad.inside, quad.places, strict=True)]

    def read(ref, h, c=0):
        return jnp.where(quad.inside[h], lanes.gather(ref, c * pixels + safe[h]), 0.0)

    warp = Warp(
        lanes=lanes,
        spec=spec,
        quad=quad,
        far=far,
        base=base,
        low=low,
        cotangent=[[read(cotangents, h, c) for c in range(spec.channels)] for h in (0, 1)],
        zero=lanes.full(0.0),
        no_int=lanes.full(0, I32),
        centred_y=[quad.centred_y, quad.centred_y + 4.0],
        owners=owners,
        sums=sums,
        stage=stage,
        order=order,
        partial=partial,
        warp_sums=warp_sums,
        warp_bits=warp_bits,
    )

    def batch(carry):
        k, fetched, running, through, behind = carry
        parity = k & 1
        ahead = reads.next(k, fetched)
        listed = k * WARP + quad.lane < mine
        number = stage_rows(lanes, spec, quad, fetched.row, listed, stage, order)
        state = (through, behind, Buffered(*[warp.no_int] * 3))
        _, running, state = lax.while_loop(
            lambda x: x[0] < number,
            functools.partial(_blend_several, warp, parity),
            (jnp.int32(0), running, state),
        )
        through, behind, buffered = state
        some_left = lanes.uniform(buffered.filled) > 0
        bits = _flush_if(some_left, warp, parity, buffered).bits
        lanes.scatter(warp_bits, parity * WARPS + quad.warp, bits, quad.lane == 0)
        # Two buffers take turns, so one barrier a batch is enough.
        lanes.block_barrier()
        turn = lanes.uniform(jnp.where(quad.warp == (k & 3), 1, 0))
        when(turn != 0, lambda: _add_warps(warp, k, parity, fetched))
        return k + 1, ahead, running, through, behind

    one = lanes.full(1.0)
    running = tuple(jnp.where(x, one, 0.0) for x in quad.inside)
    behind = tuple(read(rest, h) for h in (0, 1))
    lax.while_loop(
        lambda x: x[0] * WARP < far,
        batch,
        (jnp.int32(0), reads.first(), running, (one, one), behind),
    )


def _blend_several(warp: Warp, parity, carry):
    """Takes the next `BACKWARD_UNROLL` staged Gaussians, from number j on."""
    lanes, spec, quad = warp.lanes, warp.spec, warp.quad
    j, running, state = carry
    running = [*running]
    group, mask = [], warp.no_int
    for n in range(BACKWARD_UNROLL):
        alphas = alphas_of(quad, staged(lanes, spec, quad, warp.stage, j + n, 0, GEOMETRY))
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
            lambda *s, n=n, alphas=alphas: _send_back(
                warp, j + n, alphas, (mask >> n) & 1 != 0, parity, s
            ),
            lambda *s: s,
            *state,
        )
    return j + BACKWARD_UNROLL, tuple(running), state


def _send_back(warp: Warp, j, alphas, contributes, parity, state):
    """Adds one Gaussian's partial sums to the warp's buffer."""
    lanes, spec, quad, cotangent = warp.lanes, warp.spec, warp.quad, warp.cotangent
    # Read again: registers are scarce.
    channels = staged(lanes, spec, quad, warp.stage, j, GEOMETRY, GEOMETRY + spec.channels)
    through, behind, (filled, packed, bits) = state
    through, behind = [*through], [*behind]
    slopes, weights = [], []
    for h in (0, 1):
        q = warp.zero
        for c in range(spec.channels):
            q += cotangent[h][c] * channels[c]
        weight = through[h] * alphas[h]
        shown = weight * q
        through[h] = through[h] - weight
        behind[h] = behind[h] - shown
        slope = shown - behind[h] * (alphas[h] / (1.0 - alphas[h]))
        slopes.append(jnp.where(alphas[h] < ALPHA_MAX, slope, 0.0))  # else the clamp hides it
        weights.append(weight)
    y = warp.centred_y
    once = [y * s for y, s in zip(y, slopes, strict=True)]
    values = [slopes[0] + slopes[1], once[0] + once[1], y[0] * once[0] + y[1] * once[1]]
    for c in range(spec.channels):
        values.append(weights[0] * cotangent[0][c] + weights[1] * cotangent[1][c])
    everywhere = quad.lane >= 0
    for n, value in enumerate(values):
        at = (quad.warp * WARP + n * spec.slots + filled) * PITCH + quad.lane
        lanes.scatter(warp.partial, at, value, everywhere)
    packed = jnp.where(contributes, packed | (j << (5 * filled)), packed)
    filled = jnp.where(contributes, filled + 1, filled)
    full = lanes.uniform(filled) == spec.slots
    buffered = _flush_if(full, warp, parity, Buffered(filled, packed, bits))
    return tuple(through), tuple(behind), buffered


def _flush_if(condition, warp: Warp, parity, buffered: Buffered) -> Buffered:
    return lax.cond(condition, functools.partial(_flush, warp, parity), lambda x: x, buffered)


def _flush(warp: Warp, parity, buffered: Buffered) -> Buffered:
    """Adds up the lanes of the buffered Gaussians, and their moments in x."""
    lanes, spec, quad, zero = warp.lanes, warp.spec, warp.quad, warp.zero
    lanes.warp_barrier()
    number = lax.div(quad.lane, jnp.full_like(quad.lane, spec.slots))
    slot = quad.lane - number * spec.slots
    columns = [zero] * QUAD
    for i in range(WARP // QUAD):
        at = (quad.warp * WARP + quad.lane) * PITCH + QUAD * i
        values = lanes.gather(warp.partial, at, 4) + lanes.gather(warp.partial, at + 4, 4)
        columns = [p + q for p, q in zip(columns, values, strict=True)]
    moments = [zero] * 3
    for i, value in enumerate(columns):
        x = quad.centred_x + float(i)
        once = value * x
        moments = [p + q for p, q in zip(moments, (value, once, once * x), strict=True)]
    place = (buffered.packed >> (5 * slot)) & 31
    index = lanes.gather(warp.order, quad.warp * WARP + place)
    at = ((parity * WARPS + quad.warp) * WARP + index) * spec.sums
    used = (slot < buffered.filled) & (number < 3 + spec.channels)
    # Rows 0, 1, 2 hold the sums over y times 1, y, y^2; the others those of channels.
    first = jnp.where(number == 0, 0, jnp.where(number == 1, 2, number + 3))
    lanes.scatter(warp.warp_sums, at + jnp.where(used, first, 0), moments[0], used)
    second = jnp.where(number == 0, 1, 4)
    lanes.scatter(warp.warp_sums, at + second, moments[1], used & (number < 2))
    lanes.scatter(warp.warp_sums, at + 3, moments[2], used & (number == 0))
    lanes.warp_barrier()
    bits = buffered.bits | lanes.warp_or(jnp.where(used, jnp.int32(1) << index, 0))
    return Buffered(warp.no_int, warp.no_int, bits)


def _add_warps(warp: Warp, k, parity, fetched: Fetched) -> None:
    """One lane a Gaussian: the four warps' sums about its mean, from those about the tile."""
    lanes, spec, quad = warp.lanes, warp.spec, warp.quad
    where = k * WARP + quad.lane < warp.far
    total, any_bits = [warp.zero] * spec.sums, warp.no_int
    for w in range(WARPS):
        bits = lanes.gather(warp.warp_bits, parity * WARPS + w + warp.no_int)
        bit = (bits >> quad.lane) & 1
        at = ((parity * WARPS + w) * WARP + quad.lane) * spec.sums
        for n in range(spec.sums):
            total[n] = total[n] + jnp.where(bit != 0, lanes.gather(warp.warp_sums, at + n), 0.0)
        any_bits = any_bits | bit
    m, mx, my, mxx, mxy, myy, *channels = total
    # Mean minus the tile's centre; the quad's first pixel tells where that is.
    x = fetched.row[0] - (quad.left - quad.centred_x)
    y = fetched.row[1] - (quad.top - (quad.warp >> 1).astype(F32) * QUAD + 7.5)
    sx, sy = x * m - mx, y * m - my
    moved = [m, sx, sy, x * (sx - mx) + mxx, x * sy - y * mx + mxy, y * (sy - my) + myy]
    where = where & (any_bits != 0) & (quad.warp == (k & 3))
    address = warp.base + k * WARP + quad.lane
    for n, value in enumerate(moved + channels):
        lanes.scatter(warp.sums, (address - warp.low) * spec.sums + n, value, where)
    lanes.scatter(warp.owners, fetched.place, -1 - address, where)
