"""The kernel that adds up each Gaussian's sums and turns moments into gradients.

Tiling: a lane owns a Gaussian of an image and reads its tiles' sums in the order of its pairs.
"""

import jax.numpy as jnp
from jax import lax

from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import LANES, when, while_less
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import GATHER_UNROLL, REACH, SCALE


def gather_kernel(lanes, block, spec, first, rows, counts, begins, window, sums, owners, gradients):
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
        m, sx, sy, sxx, sxy, syy, *channels = while_less(most, add, (zero,) * spec.sums)
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
    when((low <= high) if first else (low < high), work)
