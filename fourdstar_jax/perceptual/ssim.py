"""SSIM: how alike the structure of two pictures is (Wang et al. 2004, IEEE TIP 13:600)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from fourdstar_jax.types import Array

WINDOW, SIGMA = 11, 1.5  # of the paper's Gaussian window, pixels
C1, C2 = 0.01**2, 0.03**2  # for pictures in [0, 1]


def ssim(images: Float[Array, "*b h w c"], truth: Float[Array, "*b h w c"]) -> Float[Array, "*b"]:
    """Mean SSIM of pictures in [0, 1], channel by channel; 1 for equal ones.

    Over the places where the whole window lies in the picture. Raises ValueError for pictures
    smaller than that.
    """
    h, w, channels = images.shape[-3:]
    if min(h, w) < WINDOW:
        raise ValueError(f"pictures of {w}x{h} pixels; SSIM needs {WINDOW} a side")
    x, y = (a.reshape(-1, h, w, channels).astype(jnp.float32) for a in (images, truth))
    weights = jnp.exp(-0.5 * ((jnp.arange(WINDOW) - WINDOW // 2) / SIGMA) ** 2)
    weights = weights / jnp.sum(weights)

    def mean(a):  # over the window, rows and then columns; sums of moved pictures, which fuse
        for axis in (1, 2):
            size = a.shape[axis] - WINDOW + 1
            parts = [jax.lax.slice_in_dim(a, i, i + size, axis=axis) for i in range(WINDOW)]
            a = functools.reduce(
                jnp.add, (w * part for w, part in zip(weights, parts, strict=True))
            )
        return a

    mx, my = mean(x), mean(y)
    vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    values = (2 * mx * my + C1) * (2 * cov + C2) / ((mx**2 + my**2 + C1) * (vx + vy + C2))
    return jnp.mean(values, axis=(1, 2, 3)).reshape(images.shape[:-3])
