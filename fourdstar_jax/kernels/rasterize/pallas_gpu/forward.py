"""The forward kernel: blends the list of a tile into its pixels.

Tiling: a block owns a tile, a warp a quad of 8x8 pixels, two a lane. A batch of 32 Gaussians lies
in shared memory; channels and transmittance of the pixels are accumulated in registers.
"""

import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import WARP
from fourdstar_jax.kernels.rasterize.pallas_gpu.quads import (
    List,
    alphas_of,
    quad_of,
    stage_rows,
    staged,
)
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import FORWARD_UNROLL, GEOMETRY, I32, WARPS
from fourdstar_jax.kernels.rasterize.projection import TRANSMITTANCE_MIN


def forward_kernel(lanes, tile, spec, rows, places, owners, begins, ends, planes, reached, stage):
    """Blends a tile's list; `planes` are the channels of all images, transmittance last."""
    quad = quad_of(lanes, tile, spec)
    begin, end = begins[tile], ends[tile]
    reads = List(lanes, spec, rows, places, owners, begin, end, quad.lane)
    zero = lanes.full(0.0)
    one = lanes.full(1.0)

    def blend_one(k, state):
        running, left, totals = ([*x] for x in state)
        row = staged(lanes, spec, quad, stage, k, 0, GEOMETRY + spec.channels)
        alphas = alphas_of(quad, row[:GEOMETRY])
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
        number = stage_rows(lanes, spec, quad, fetched.row, listed, stage, None)

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
