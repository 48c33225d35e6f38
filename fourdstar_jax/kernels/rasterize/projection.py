"""Projects 3D Gaussians to the image plane (EWA splatting, Zwicker et al. 2001).

Shared by every implementation of `rasterize`, and left to autodiff. Components are leading axes and
every sum runs over planes `[..., V, G]`: batches of 3x3 products are slow on every backend.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from fourdstar_jax.types import Cameras, Gaussians

# gsplat 1.5.3's constants (Apache-2.0; its later 1.6 clamps alpha at 0.99 instead).
ALPHA_MIN = 1.0 / 255.0  # smaller contributions are skipped
ALPHA_MAX = 0.999
TRANSMITTANCE_MIN = 1e-4  # a Gaussian that would leave this much or less ends its pixel


class Projected(NamedTuple):
    """Gaussians as one camera sees them. Culled ones have radii 0 and opacity 0.

    The exponent at pixel offset (dx, dy) = mean - pixel is
    sigma = ((a dx + b dy)^2 + (c dy)^2) / 2 with (a, b, c) = `conic_roots`: the triangular root
    of the inverse covariance. Unlike the conic itself it cannot give a negative sigma, and it keeps
    its digits for needles, whose conic has lost them in float32.
    """

    means2d: Float[Array, "*b V G 2"]  # pixels
    conic_roots: Float[Array, "*b V G 3"]  # 1 / pixels
    opacities: Float[Array, "*b V G"]
    depths: Float[Array, "*b V G"]  # camera z
    radii: Float[Array, "*b V G 2"]  # half the box outside of which alpha < ALPHA_MIN, pixels


def usable_mask(
    gaussians: Gaussians, features: Float[Array, "*b G F"] | None = None
) -> Bool[Array, "*c G"]:
    """Which Gaussians have only finite numbers; the others are dropped whole by `rasterize`."""
    usable = jnp.isfinite(gaussians.opacities)
    rows = [gaussians.means, gaussians.quats, gaussians.scales, gaussians.colors]
    for x in rows + ([] if features is None else [features]):
        usable = usable & jnp.all(jnp.isfinite(x), axis=-1)
    return usable


def _rotation_times_scale(quats, scales):
    """The factor M of the covariance M M^T as planes [3, 3, ..., G]."""
    # Dividing by the largest component first keeps the squares of any quaternion in range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(quats), axis=-1))
    zero = largest == 0
    q = jnp.moveaxis(quats, -1, 0) / jnp.where(zero, 1.0, largest)
    w, v = jnp.where(zero, 1.0, q[0]), q[1:]
    eye = _planes(np.eye(3), w)
    cross = jnp.stack([0 * w, -v[2], v[1], v[2], 0 * w, -v[0], -v[1], v[0], 0 * w])
    v2 = jnp.sum(v * v, axis=0)
    rot = (w * w - v2) * eye + 2 * v[:, None] * v + 2 * w * cross.reshape(3, 3, *w.shape)
    return rot / (w * w + v2) * jnp.moveaxis(scales, -1, 0)


def _planes(constant, like):
    """A constant array with trailing axes of 1 that broadcast against `like`."""
    return jnp.asarray(constant, like.dtype).reshape(*constant.shape, *(1,) * like.ndim)


def _to_image(xyz, factor, rotation, Ks, width, height):
    """Image positions [2, ...] and rows J R M [2, 3, ...], whose products are the covariance."""
    focal, centre = Ks
    rz = 1 / xyz[2]
    # Outside of 1.3 times the field of view the Jacobian is taken at its edge (gsplat, Inria).
    size = _planes(np.array([width, height]), rz)
    margin = 0.15 * size / focal
    slope = jnp.clip(xyz[:2] * rz, -centre / focal - margin, (size - centre) / focal + margin)
    rows = (focal * rz)[:, None] * (rotation[:2] - slope[:, None] * rotation[2])  # [2, 3, ...]
    rows = jnp.sum(rows[:, :, None] * factor, axis=1)
    return focal * xyz[:2] * rz + centre, rows


def _covariance(rows, eps2d):
    """Blurred 2D covariance (xx, xy, yy), its determinant, and the determinant before the blur.

    The determinant of a product is the sum of its squared minors (Cauchy-Binet), which never
    becomes negative and keeps digits that xx yy - xy^2 loses.
    """
    P, Q = rows
    xx, xy, yy = jnp.sum(P * P, axis=0), jnp.sum(P * Q, axis=0), jnp.sum(Q * Q, axis=0)
    sharp = jnp.sum((P * jnp.roll(Q, 1, axis=0) - jnp.roll(P, 1, axis=0) * Q) ** 2, axis=0)
    blurred = sharp + eps2d * (xx + yy) + eps2d * eps2d
    return xx + eps2d, xy, yy + eps2d, blurred, sharp


def project(
    gaussians: Gaussians,
    cameras: Cameras,
    usable: Bool[Array, "*c G"],
    *,
    width: int,
    height: int,
    near: float,
    far: float,
    eps2d: float,
    antialiased: bool,
) -> Projected:
    """Projects every Gaussian into every camera; leading axes broadcast.

    eps2d is added to the diagonal of the 2D covariance, in pixels squared; `antialiased` multiplies
    opacities by sqrt(det / det_blurred) (Mip-Splatting, as gsplat). Culled are Gaussians that are
    not `usable`, lie nearer than `near` or farther than `far`, never reach ALPHA_MIN, or whose
    projection leaves the range of the float type. Gradients of culled ones are zero.
    """
    # Components lead, so both sides need equally many batch axes to line up behind them.
    axes = max(gaussians.means.ndim - 2, cameras.Ks.ndim - 3)
    gaussians, usable = jax.tree.map(
        lambda x: x.reshape(*(1,) * (axes + 1 - usable.ndim), *x.shape), (gaussians, usable)
    )
    cameras = jax.tree.map(
        lambda x: x.reshape(*(1,) * (axes + 3 - cameras.Ks.ndim), *x.shape), cameras
    )
    # [3, 3, ..., V, 1] of cameras against [3, ..., 1, G] of Gaussians.
    viewmats = jnp.moveaxis(cameras.viewmats, (-2, -1), (0, 1))[..., None]
    rotation = viewmats[:3, :3]
    Ks = jnp.moveaxis(cameras.Ks, (-2, -1), (0, 1))[..., None]
    Ks = (jnp.stack([Ks[0, 0], Ks[1, 1]]), Ks[:2, 2])
    means = jnp.moveaxis(gaussians.means, -1, 0)[..., None, :]
    xyz = jnp.sum(rotation * means, axis=1) + viewmats[:3, 3]  # [3, ..., V, G]
    factor = _rotation_times_scale(gaussians.quats, gaussians.scales)[..., None, :]

    # A dry run finds the pairs to cull; they then go through as a harmless point, for a NaN in
    # an unused branch would still reach the gradients.
    dry = jax.lax.stop_gradient((xyz, factor, rotation, Ks))
    means2d, rows = _to_image(*dry, width, height)
    xx, _, yy, det, _ = _covariance(rows, eps2d)
    total = means2d[0] + means2d[1] + xx / det + yy / det + 1 / xx + 1 / yy
    keep = (dry[0][2] >= near) & (dry[0][2] <= far) & usable[..., None, :]
    keep &= jnp.isfinite(total) & (det > 0)

    xyz = jnp.where(keep, xyz, _planes(np.array([0.0, 0.0, 1.0]), xyz[0]))
    factor = jnp.where(keep, factor, 0.0)
    means2d, rows = _to_image(xyz, factor, rotation, Ks, width, height)
    xx, xy, yy, det, sharp = _covariance(rows, eps2d)
    xx, yy, det = (jnp.where(keep, x, 1.0) for x in (xx, yy, det))

    opacities = jnp.where(keep, gaussians.opacities[..., None, :], 0.0)
    if antialiased:
        ratio = jnp.where(keep, sharp, 0.0) / det
        thin = ratio <= 0
        opacities *= jnp.where(thin, 0.0, jnp.sqrt(jnp.where(thin, 1.0, ratio)))

    a = jnp.sqrt(yy / det)
    roots = jnp.stack([a, -a * xy / yy, 1 / jnp.sqrt(yy)], axis=-1)
    # alpha >= ALPHA_MIN means sigma <= reach; the box holds that ellipse with a little to spare.
    reach = jnp.log(jnp.maximum(jax.lax.stop_gradient(opacities), 1e-12) / ALPHA_MIN)
    visible = keep & (reach > -1e-3)
    reach = 2 * (jnp.maximum(reach, 0.0) + 1e-3)
    radii = jnp.stack([jnp.sqrt(reach * xx), jnp.sqrt(reach * yy)], axis=-1) * 1.001 + 0.01
    return Projected(
        means2d=jnp.moveaxis(means2d, 0, -1),
        conic_roots=roots,
        opacities=jnp.where(visible, opacities, 0.0),
        depths=xyz[2],
        radii=jax.lax.stop_gradient(jnp.where(visible[..., None], radii, 0.0)),
    )
