"""Projects 3D Gaussians to the image plane (EWA splatting, Zwicker et al. 2001).

Shared by every implementation of `rasterize`, and left to autodiff. Every number is a plane
`[..., V, G]` of its own: batches of 3x3 products, and arrays whose last axis has two or three
elements, are slow on every backend.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
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


class Planes(NamedTuple):
    """The numbers of `Projected`, a plane each."""

    u: Float[Array, "*b V G"]  # means2d, pixels
    v: Float[Array, "*b V G"]
    a: Float[Array, "*b V G"]  # conic_roots, 1 / pixels
    b: Float[Array, "*b V G"]
    c: Float[Array, "*b V G"]
    opacities: Float[Array, "*b V G"]
    depths: Float[Array, "*b V G"]
    radii_x: Float[Array, "*b V G"]
    radii_y: Float[Array, "*b V G"]


def usable_mask(
    gaussians: Gaussians, features: Float[Array, "*b G F"] | None = None
) -> Bool[Array, "*c G"]:
    """Marks Gaussians that have only finite numbers; `rasterize` drops the others whole."""
    usable = jnp.isfinite(gaussians.opacities)
    rows = [gaussians.means, gaussians.quats, gaussians.scales, gaussians.colors]
    for x in rows + ([] if features is None else [features]):
        usable = usable & jnp.all(jnp.isfinite(x), axis=-1)
    return usable


def _to_every_view(arrays, views):
    """Planes [..., 1, G] as [..., V, G]."""
    return [jnp.broadcast_to(x, (*x.shape[:-2], views, x.shape[-1])) for x in arrays]


def _to_every_view_fwd(arrays, views):
    return _to_every_view(arrays, views), None


def _to_every_view_bwd(views, _, cotangents):
    # The barrier has all planes computed once; XLA would otherwise compute the whole projection's
    # gradient anew within each plane's sum over the views.
    cotangents = jax.lax.optimization_barrier(cotangents)
    return ([jnp.sum(x, axis=-2, keepdims=True) for x in cotangents],)


_to_every_view = jax.custom_vjp(_to_every_view, nondiff_argnums=(1,))
_to_every_view.defvjp(_to_every_view_fwd, _to_every_view_bwd)


def _rotation_times_scale(quats, scales):
    """The factor M of the covariance M M^T: rows of planes [..., 1, G]."""
    # Dividing by the largest component first keeps the squares of any quaternion in range.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(quats), axis=-1))
    zero = largest == 0
    largest = jnp.where(zero, 1.0, largest)
    w, x, y, z = (quats[..., i] / largest for i in range(4))
    w = jnp.where(zero, 1.0, w)
    ww, xx, yy, zz = w * w, x * x, y * y, z * z
    rotation = [
        [ww + xx - yy - zz, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), ww - xx + yy - zz, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), ww - xx - yy + zz],
    ]
    norm = 1 / (ww + xx + yy + zz)
    return [[(row[k] * norm * scales[..., k])[..., None, :] for k in range(3)] for row in rotation]


def _to_image(xyz, factor, rotation, intrinsics, size):
    """Image positions, and rows of J R M, whose products are the covariance."""
    x, y, z = xyz
    rz = 1 / z
    positions, rows = [], []
    for axis, p in enumerate((x, y)):
        focal, centre = intrinsics[axis]
        positions.append(focal * p * rz + centre)
        # Outside of 1.3 times the field of view the Jacobian is taken at its edge (gsplat, Inria).
        margin = 0.15 * size[axis] / focal
        slope = jnp.clip(p * rz, -centre / focal - margin, (size[axis] - centre) / focal + margin)
        scale = focal * rz
        along = [scale * (rotation[axis][k] - slope * rotation[2][k]) for k in range(3)]
        rows.append([sum(along[i] * factor[i][k] for i in range(3)) for k in range(3)])
    return positions, rows


def _times(rows, factor):
    return [[x * factor for x in row] for row in rows]


def _covariance(rows, eps2d):
    """Blurred 2D covariance (xx, xy, yy), its determinant, and the determinant before the blur.

    The determinant of a product is the sum of its squared minors (Cauchy-Binet), which never
    becomes negative and keeps digits that xx yy - xy^2 loses.
    """
    p, q = rows
    xx, xy, yy = (
        sum(s * t for s, t in zip(a, b, strict=True)) for a, b in ((p, p), (p, q), (q, q))
    )
    sharp = sum((p[i] * q[i - 1] - p[i - 1] * q[i]) ** 2 for i in range(3))
    blurred = sharp + eps2d * (xx + yy) + eps2d * eps2d
    return xx + eps2d, xy, yy + eps2d, blurred, sharp


def project_planes(
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
) -> Planes:
    """Projects every Gaussian into every camera; leading axes broadcast.

    eps2d is added to the diagonal of the 2D covariance, in pixels squared; `antialiased` multiplies
    opacities by sqrt(det / det_blurred) (Mip-Splatting, as gsplat). Culled are Gaussians that are
    not `usable`, lie nearer than `near` or farther than `far`, never reach ALPHA_MIN, or whose
    projection leaves the range of the float type. Gradients of culled ones are zero.
    """
    size = (width, height)
    # [..., V, 1] of cameras against [..., 1, G] of Gaussians.
    viewmats, Ks = cameras.viewmats[..., None], cameras.Ks[..., None]
    rotation = [[viewmats[..., i, j, :] for j in range(3)] for i in range(3)]
    intrinsics = [(Ks[..., i, i, :], Ks[..., i, 2, :]) for i in range(2)]
    factor = _rotation_times_scale(gaussians.quats, gaussians.scales)
    shared = [gaussians.means[..., None, :, k] for k in range(3)]
    shared += [gaussians.opacities[..., None, :], *sum(factor, start=[])]
    *means, opacities, f0, f1, f2, f3, f4, f5, f6, f7, f8 = _to_every_view(
        shared, cameras.Ks.shape[-3]
    )
    factor = [[f0, f1, f2], [f3, f4, f5], [f6, f7, f8]]
    xyz = [
        sum(rotation[i][k] * means[k] for k in range(3)) + viewmats[..., i, 3, :] for i in range(3)
    ]

    # A dry run finds the pairs to cull; they then go through as a harmless point, for a NaN in
    # an unused branch would still reach the gradients.
    dry = jax.lax.stop_gradient((xyz, factor, rotation, intrinsics))
    (u, v), rows = _to_image(*dry, size)
    # Large rows in units of the largest one, for the determinant has their fourth power.
    unit = functools.reduce(jnp.maximum, [jnp.abs(x) for row in rows for x in row])
    unit = jnp.where(unit > 2.0**24, unit, 1.0)
    inverse = 1 / unit
    xx, _, yy, det, _ = _covariance(_times(rows, inverse), eps2d * inverse * inverse)
    total = u + v + xx / det + yy / det + 1 / xx + 1 / yy
    keep = (dry[0][2] >= near) & (dry[0][2] <= far) & usable[..., None, :]
    # Gradients have squares of these below the line, and of positions.
    least = 8 * float(jnp.finfo(xx.dtype).tiny) ** 0.5
    keep &= jnp.isfinite(total) & jnp.isfinite((xx + yy) * unit * unit)
    keep &= (jnp.minimum(yy, det) > least) & (jnp.maximum(jnp.abs(u), jnp.abs(v)) < least**-0.5)
    unit, inverse = (jnp.where(keep, x, 1.0) for x in (unit, inverse))

    xyz = [jnp.where(keep, x, harmless) for x, harmless in zip(xyz, (0.0, 0.0, 1.0), strict=True)]
    factor = [[jnp.where(keep, x, 0.0) for x in row] for row in factor]
    (u, v), rows = _to_image(xyz, factor, rotation, intrinsics, size)
    xx, xy, yy, det, sharp = _covariance(_times(rows, inverse), eps2d * inverse * inverse)
    xx, yy, det = (jnp.where(keep, x, 1.0) for x in (xx, yy, det))

    opacities = jnp.where(keep, opacities, 0.0)
    if antialiased:
        ratio = jnp.where(keep, sharp, 0.0) / det
        thin = ratio <= 0
        opacities *= jnp.where(thin, 0.0, jnp.sqrt(jnp.where(thin, 1.0, ratio)))

    a = jnp.sqrt(yy / det) * inverse
    # alpha >= ALPHA_MIN means sigma <= reach; the box holds that ellipse with a little to spare.
    reach = jnp.log(jnp.maximum(jax.lax.stop_gradient(opacities), 1e-12) / ALPHA_MIN)
    visible = keep & (reach > -1e-3)
    reach = 2 * (jnp.maximum(reach, 0.0) + 1e-3)
    radii = [
        jax.lax.stop_gradient(jnp.where(visible, jnp.sqrt(reach * x) * unit * 1.001 + 0.01, 0.0))
        for x in (xx, yy)
    ]
    return Planes(
        u,
        v,
        a,
        -a * xy / yy,
        1 / jnp.sqrt(yy) * inverse,
        jnp.where(visible, opacities, 0.0),
        xyz[2],
        *radii,
    )


def project(
    gaussians: Gaussians, cameras: Cameras, usable: Bool[Array, "*c G"], **options
) -> Projected:
    """`project_planes` with its planes stacked, for implementations that gather rows."""
    u, v, a, b, c, opacities, depths, *radii = project_planes(gaussians, cameras, usable, **options)
    return Projected(
        means2d=jnp.stack([u, v], axis=-1),
        conic_roots=jnp.stack([a, b, c], axis=-1),
        opacities=opacities,
        depths=depths,
        radii=jnp.stack(radii, axis=-1),
    )
