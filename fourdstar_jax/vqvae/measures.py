"""What is measured of the 4D VQ-VAE besides its losses: steadiness in time, and its Gaussians."""

import jax.numpy as jnp
from jaxtyping import Float

from fourdstar_jax.perceptual.lpips import LPIPS
from fourdstar_jax.types import Array, Gaussians
from fourdstar_jax.vqvae.losses import NEAR, OwnPixels, own_surface

OPAQUE = 0.5  # opacity of a Gaussian that counts as surface
BINS = 5  # of the histogram of opacity


def temporal_lpips(
    lpips: LPIPS, renders: Float[Array, "*b T V h w 3"], images: Float[Array, "*b T V h w 3"]
) -> Float[Array, "*b"]:
    """Mean |LPIPS(r(t), r(t+1)) - LPIPS(g(t), g(t+1))|, TecoGAN's tLP (arXiv:1811.09393)."""

    def change(x):
        x = jnp.asarray(x)
        return lpips(x[..., :-1, :, :, :, :], x[..., 1:, :, :, :, :])

    return jnp.mean(jnp.abs(change(renders) - change(images)), axis=(-2, -1))


def gaussian_statistics(
    gaussians: Gaussians, own: OwnPixels, *, resolution: int
) -> dict[str, Float[Array, ""]]:
    """Figures of Gaussians `[B, T, G, ...]`, which are view-major maps of the views of `own`.

    opacity_0 .. opacity_4: shares of all Gaussians by opacity, in fifths. scale_median: of the
    geometric means of the three axes, scene units; scale_ratio_median: longest by shortest axis.
    outside: share of all whose centre its own view does not see. depth_error: median over opaque
    Gaussians of pixels of the object of the distance to the true surface along the view's axis,
    scene units, and 1 where there are none; covered: share of those pixels that have an opaque one.
    """
    z, truth, known, _ = own_surface(gaussians, own)
    shape = z.shape  # [B, T, V, m, m]
    opacity = gaussians.opacities.reshape(shape)
    opaque = known * (opacity > OPAQUE)
    errors = jnp.where(opaque > 0, jnp.abs(z - truth), jnp.nan)
    error = jnp.where(jnp.any(opaque > 0), jnp.nanmedian(errors), 1.0)
    log = jnp.log(gaussians.scales)
    ratio = jnp.exp(jnp.max(log, axis=-1) - jnp.min(log, axis=-1))

    viewmats, Ks = (x[:, None, :] for x in own.cameras)  # [B, 1, V, ...]
    means = gaussians.means.reshape(*shape, 3)
    local = jnp.einsum("bovxc,btvijc->btvijx", viewmats[..., :3, :3], means)
    local = local + viewmats[..., None, None, :3, 3]
    depth = jnp.maximum(local[..., 2], NEAR)
    inside = local[..., 2] > NEAR
    for axis in range(2):
        focal = Ks[..., axis, axis, None, None]
        pixel = focal * local[..., axis] / depth + Ks[..., axis, 2, None, None]
        inside = inside & (pixel >= 0) & (pixel <= resolution)

    bins = jnp.clip((BINS * opacity).astype(jnp.int32), 0, BINS - 1)
    return {
        **{f"opacity_{i}": jnp.mean(bins == i) for i in range(BINS)},
        "scale_median": jnp.median(jnp.exp(jnp.mean(log, axis=-1))),
        "scale_ratio_median": jnp.median(ratio),
        "outside": jnp.mean(~inside),
        "depth_error": error,
        "covered": jnp.sum(opaque) / jnp.maximum(jnp.sum(known), 1.0),
    }
