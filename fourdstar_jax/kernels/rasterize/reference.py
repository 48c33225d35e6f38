"""The definition of `rasterize`: every pixel looks at every Gaussian. Plain, dense and slow."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fourdstar_jax.kernels.rasterize.projection import (
    ALPHA_MAX,
    ALPHA_MIN,
    TRANSMITTANCE_MIN,
    Projected,
)


def blend_pixels(
    projected: Projected, channels: Float[Array, "G C"], pixels: Float[Array, "P 2"]
) -> Float[Array, "P C+1"]:
    """Blends depth-sorted Gaussians of one camera front to back at points (x, y) of its image.

    The last channel returned is the transmittance that is left.
    """
    offsets = projected.means2d - pixels[:, None]  # [P, G, 2]
    dx, dy = offsets[..., 0], offsets[..., 1]
    a, b, c = (projected.conic_roots[:, i] for i in range(3))
    sigma = 0.5 * ((a * dx + b * dy) ** 2 + (c * dy) ** 2)
    alphas = jnp.minimum(projected.opacities * jnp.exp(-sigma), ALPHA_MAX)
    alphas = jnp.where(alphas >= ALPHA_MIN, alphas, 0.0)
    after = jnp.cumprod(1 - alphas, axis=1)
    before = jnp.concatenate([jnp.ones_like(after[:, :1]), after[:, :-1]], axis=1)
    allowed = after > TRANSMITTANCE_MIN
    weights = jnp.where(allowed, alphas * before, 0.0)
    left = jnp.prod(jnp.where(allowed, 1 - alphas, 1.0), axis=1, keepdims=True)
    return jnp.concatenate([weights @ channels, left], axis=1)


def blend(
    projected: Projected,
    channels: Float[Array, "I G C"],
    *,
    width: int,
    height: int,
) -> Float[Array, "I h w C+1"]:
    """Images of I cameras, each with its own Gaussians; the last channel is transmittance."""
    columns, rows = (jnp.arange(n, dtype=channels.dtype) + 0.5 for n in (width, height))
    pixels = jnp.stack(jnp.meshgrid(columns, rows), axis=-1)  # [h, w, 2]

    def image(args):
        projected, channels = args
        # Culled Gaussians go last; equal depths keep the lower index in front.
        culled = projected.radii[:, 0] == 0
        order = jnp.argsort(jnp.where(culled, jnp.inf, projected.depths), stable=True)
        projected, channels = jax.tree.map(lambda x: x[order], (projected, channels))
        row = jax.checkpoint(lambda pixels: blend_pixels(projected, channels, pixels))
        return jax.lax.map(row, pixels)

    return jax.lax.map(image, (projected, channels))
