"""Vectors of tokens and places: codebook look-up, learned places, waves, rays of patches."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax import geometry
from fourdstar_jax.types import Cameras


def lookup(
    codebooks: Float[Array, "K vocab d"], tokens: Int[Array, "*b K"]
) -> Float[Array, "*b D"]:
    """Codes of tokens: the K codebook vectors of a token side by side."""
    vectors = codebooks[jnp.arange(codebooks.shape[0]), tokens]  # [..., K, d]
    return vectors.reshape(*tokens.shape[:-1], codebooks.shape[0] * codebooks.shape[2])


def learned_embedding(grid: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """A vector for every place of a square grid, N(0, 0.02)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (grid * grid, dim), jnp.float32))


def sincos(x: Float[Array, "*b"], frequencies: Float[Array, " F"]) -> Float[Array, "*b F2"]:
    """Sines, then cosines, of x at these angular frequencies."""
    angles = x[..., None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def patch_rays(cameras: Cameras, *, resolution: int, grid: int) -> Float[Array, "B V n P 6"]:
    """Plücker rays of every token's P pixels, row by row, of `grid` x `grid` tokens a view.

    The intrinsics are those of images of `resolution` pixels a side.
    """
    rays = geometry.plucker_rays(cameras, width=resolution, height=resolution)
    return rearrange(rays, "b v (i p) (j q) c -> b v (i j) (p q) c", i=grid, j=grid)
