"""Made clips, as tokens: figures of eight blocks, seen from four sides."""

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax import geometry
from fourdstar_jax.types import Cameras

VIEWS, GRID, SHADES = 4, 4, 4  # views around, tokens a side of a view, codes that blocks have
# Which upright edge, 0 to 3 around the figure, each view has on its left and on its right; the
# video's, the first, has 0 and 1.
EDGES = np.array([[0, 1], [1, 2], [2, 3], [3, 0]])


def cameras(clips: int, size: int) -> Cameras:
    """The rig of every clip, [clips, V], for pictures of `size` pixels."""
    rig = geometry.orbit_cameras([360 * i / VIEWS for i in range(VIEWS)], width=size, height=size)
    return Cameras(*(np.tile(x, (clips, 1, 1, 1)) for x in rig))


def tokens(key: jax.Array, clips: int, timesteps: int, codes: int) -> jax.Array:
    """Tokens [clips, T, V, n, K] of other figures for every key; code 0 in every codebook is blank.

    A figure has two blocks on top of each other at each of its four edges, with K codes of `SHADES`
    each. Every view shows the four blocks of two edges in its two middle columns. Those in front
    take other codes at each timestep, which only the video tells; the others keep theirs, which
    only the past tells. At one timestep in five the figure hops by a row.
    """
    screen_key, block_key, hop_key = jax.random.split(key, 3)
    kept = jax.random.randint(block_key, (clips, 1, 2, 2, codes), 1, 1 + SHADES, jnp.int32)
    shape = (clips, timesteps, 2, 2, codes)
    screens = jax.random.randint(screen_key, shape, 1, 1 + SHADES, jnp.int32)
    edges = jnp.concatenate([screens, jnp.broadcast_to(kept, shape)], axis=3)
    seen = jnp.moveaxis(edges[:, :, :, EDGES], 3, 2)  # [clips, T, V, row, column, K]
    middle = (GRID - 2) // 2
    seen = jnp.pad(seen, [(0, 0)] * 3 + [(middle, middle)] * 2 + [(0, 0)])
    hops = jnp.array([-1, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    rows = jnp.cumsum(jax.random.choice(hop_key, hops, (clips, timesteps)), axis=1)
    rows = jnp.clip(rows, -middle, middle)
    moved = jax.vmap(jax.vmap(lambda x, r: jnp.roll(x, r, axis=1)))(seen, rows)
    return moved.reshape(clips, timesteps, VIEWS, GRID**2, codes)
