"""Quaternions, rigid transforms, cameras, the rig that sees an object, Plücker rays.

World frame: x right, y up, z towards the camera of azimuth 0 (glTF's and kiui's). Cameras are
OpenCV: x right, y down, +z forward.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from fourdstar_jax import arguments
from fourdstar_jax.outside import Fields
from fourdstar_jax.types import Array, Cameras, Gaussians

RADIUS, FOV_DEG = 1.5, 49.1  # of every rig here, scene units and degrees: L4GM's and LGM's
# The size of an object in its pictures, a fraction of their side: see `apparent_size`.
OCCUPANCY = 0.58
WIDE = 1.5  # an object so many times as wide as high still has the size of its height


def apparent_size(width: float, height: float) -> float:
    """Size of what is `width` wide and `height` high in a picture: the one rule for all objects.

    The views around an object agree on its height and much less on its width. So the height
    counts, and the width only of what is wider than WIDE heights.
    """
    return max(height, width / WIDE)


def normalize(x: Float[Array, "*b n"], eps: float = 1e-12) -> Float[jax.Array, "*b n"]:
    """Unit vectors along the last axis; a zero vector stays zero, with a zero gradient."""
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    tiny = square < eps
    return jnp.where(tiny, 0.0, x / jnp.sqrt(jnp.where(tiny, 1.0, square)))


def quat_to_rotmat(quats: Float[Array, "*b 4"]) -> Float[jax.Array, "*b 3 3"]:
    """Rotation matrices of wxyz quaternions of any length; zero counts as the identity."""
    norm2 = jnp.sum(quats * quats, axis=-1, keepdims=True)
    tiny = norm2 < 1e-24
    q = jnp.where(tiny, 0.0, quats / jnp.sqrt(jnp.where(tiny, 1.0, norm2)))
    w, x, y, z = jnp.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


def rotmat_to_quat(rotmats: Float[Array, "*b 3 3"]) -> Float[jax.Array, "*b 4"]:
    """Unit wxyz quaternions, w >= 0, of rotation matrices (largest-component method)."""
    m = rotmats
    t = jnp.stack(
        [
            1 + m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2],
            1 + m[..., 0, 0] - m[..., 1, 1] - m[..., 2, 2],
            1 - m[..., 0, 0] + m[..., 1, 1] - m[..., 2, 2],
            1 - m[..., 0, 0] - m[..., 1, 1] + m[..., 2, 2],
        ],
        axis=-1,
    )
    a, b, c = (m[..., 2, 1], m[..., 0, 2], m[..., 1, 0])
    d, e, f = (m[..., 1, 2], m[..., 2, 0], m[..., 0, 1])
    candidates = jnp.stack(
        [
            jnp.stack([t[..., 0], a - d, b - e, c - f], -1),
            jnp.stack([a - d, t[..., 1], c + f, b + e], -1),
            jnp.stack([b - e, c + f, t[..., 2], a + d], -1),
            jnp.stack([c - f, b + e, a + d, t[..., 3]], -1),
        ],
        axis=-2,
    )
    best = jnp.argmax(t, axis=-1)[..., None, None]
    q = normalize(jnp.take_along_axis(candidates, best, axis=-2)[..., 0, :])
    return jnp.where(q[..., :1] < 0, -q, q)


def quat_multiply(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"]) -> Float[jax.Array, "*b 4"]:
    """Hamilton product of wxyz quaternions: rotating by b, then by a."""
    aw, ax, ay, az = jnp.moveaxis(a, -1, 0)
    bw, bx, by, bz = jnp.moveaxis(b, -1, 0)
    return jnp.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def invert_rigid(mats: Float[Array, "*b 4 4"]) -> Float[jax.Array, "*b 4 4"]:
    """Inverse of rigid transforms; turns viewmats into camera-to-world and back."""
    mats = jnp.asarray(mats)
    rot_t = jnp.swapaxes(mats[..., :3, :3], -1, -2)
    trans = -jnp.einsum("...ij,...j->...i", rot_t, mats[..., :3, 3])
    top = jnp.concatenate([rot_t, trans[..., None]], axis=-1)
    bottom = jnp.broadcast_to(mats[..., 3:, :], (*mats.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], axis=-2)


def _angles(name: str, value: Any) -> Float[np.ndarray, "*V"]:
    """Finite angles in degrees. Raises ValueError, which names them, for anything else."""
    try:
        angles = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        angles = np.array(np.nan)
    if not np.isfinite(angles).all():
        raise ValueError(f"{name}={arguments.shown(value)} must be finite numbers, in degrees")
    return angles


@typing.no_type_check  # arguments are checked below, in the tests as elsewhere
def orbit_cameras(
    azimuths_deg: npt.ArrayLike,  # [V]
    elevations_deg: npt.ArrayLike = 0.0,  # [V] or one for all
    *,
    radius: float = RADIUS,
    fov_deg: float = FOV_DEG,
    width: int,
    height: int,
) -> Cameras:
    """Cameras around the y axis that look at the origin, as numpy arrays.

    Azimuth 0 stands on +z, azimuth 90 on +x; a negative elevation looks from above (kiui's
    convention, as in LGM and L4GM). `fov_deg` spans the shorter image side.
    """
    width, height = arguments.whole("width", width, 1), arguments.whole("height", height, 1)
    radius = arguments.real("radius", radius, 1e-3, 1e6)
    fov_deg = arguments.real("fov_deg", fov_deg, 0.1, 179)
    az = np.deg2rad(_angles("azimuths_deg", azimuths_deg))
    el = _angles("elevations_deg", elevations_deg)
    if az.ndim != 1 or el.shape not in ((), (1,), az.shape):
        shapes = f"azimuths_deg has shape {az.shape}, elevations_deg {el.shape}"
        raise ValueError(f"{shapes}; [V], and [V] or one for all, are needed")
    el = np.deg2rad(np.broadcast_to(el, az.shape))
    position = radius * np.stack(
        [np.cos(el) * np.sin(az), -np.sin(el), np.cos(el) * np.cos(az)], axis=-1
    )
    forward = -position / radius
    up = np.broadcast_to([0.0, 1.0, 0.0], forward.shape)
    right = np.cross(forward, up)
    right /= np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    rot = np.stack([right, down, forward], axis=-2)  # rows are the camera's axes
    viewmats = np.broadcast_to(np.eye(4), (len(az), 4, 4)).copy()
    viewmats[:, :3, :3] = rot
    viewmats[:, :3, 3] = -np.einsum("vij,vj->vi", rot, position)
    focal = min(width, height) / (2 * np.tan(np.deg2rad(fov_deg) / 2))
    K = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    Ks = np.broadcast_to(K, (len(az), 3, 3)).copy()
    return Cameras(viewmats.astype(np.float32), Ks.astype(np.float32))


@dataclasses.dataclass(frozen=True)
class Rig:
    """The cameras that see an object, in a ring around it, and how often they look."""

    azimuths_deg: tuple[float, ...]  # [V]; the input view comes first
    fps: float  # timesteps a second
    radius: float = RADIUS  # of the ring, scene units
    fov_deg: float = FOV_DEG

    @classmethod
    def around(cls, num_views: int, *, fps: float) -> "Rig":
        """Views equally spaced, the first at azimuth 0."""
        return cls(tuple(360.0 * view / num_views for view in range(num_views)), fps)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "rig") -> "Rig":
        """The inverse of `to_dict`. Raises ValueError for a field that is missing or not right.

        `where` names the file in it.
        """
        fields = Fields(values, where)
        fields.only(field.name for field in dataclasses.fields(cls))
        return cls(
            azimuths_deg=tuple(fields.numbers("azimuths_deg", -3600, 3600, most=64)),
            fps=fields.number("fps", 1e-3, 1000),
            radius=fields.number("radius", 1e-3, 1e6),
            fov_deg=fields.number("fov_deg", 0.1, 179),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "azimuths_deg": list(self.azimuths_deg)}

    @property
    def num_views(self) -> int:
        return len(self.azimuths_deg)

    def cameras(self, size: int) -> Cameras:
        """The views `[V, ...]` with intrinsics for images of `size` pixels a side; numpy."""
        azimuths_deg = np.asarray(self.azimuths_deg)
        return orbit_cameras(
            azimuths_deg, radius=self.radius, fov_deg=self.fov_deg, width=size, height=size
        )


def rescale_intrinsics(Ks: Float[Array, "*b 3 3"], factor: float) -> Float[jax.Array, "*b 3 3"]:
    """Intrinsics of the same camera with its image `factor` times as large."""
    return jnp.asarray(Ks) * jnp.array([factor, factor, 1.0], Ks.dtype)[:, None]


def pixel_rays(
    cameras: Cameras, *, width: int, height: int
) -> tuple[Float[jax.Array, "*b V h w 3"], Float[jax.Array, "*b V h w 3"]]:
    """Origins and unit directions, in the world frame, of the rays through the pixel centres."""
    viewmats, Ks = cameras
    x = (jnp.arange(width) + 0.5 - Ks[..., None, None, 0, 2]) / Ks[..., None, None, 0, 0]
    y = (jnp.arange(height)[:, None] + 0.5 - Ks[..., None, None, 1, 2]) / Ks[..., None, None, 1, 1]
    x, y = jnp.broadcast_arrays(x, y)
    local = normalize(jnp.stack([x, y, jnp.ones_like(x)], axis=-1))  # [..., V, h, w, 3]
    c2w = invert_rigid(viewmats)
    directions = jnp.einsum("...ij,...hwj->...hwi", c2w[..., :3, :3], local)
    origins = jnp.broadcast_to(c2w[..., None, None, :3, 3], directions.shape)
    return origins, directions


def plucker_rays(cameras: Cameras, *, width: int, height: int) -> Float[jax.Array, "*b V h w 6"]:
    """Plücker coordinates [o x d, d] of every pixel's ray (SPAD; MVAR uses the same order)."""
    origins, directions = pixel_rays(cameras, width=width, height=height)
    return jnp.concatenate([jnp.cross(origins, directions), directions], axis=-1)


def transform_gaussians(gaussians: Gaussians, mats: Float[Array, "*b 4 4"]) -> Gaussians:
    """Gaussians moved by rigid transforms (leading axes broadcast against the Gaussians')."""
    rot = mats[..., None, :3, :3]
    means = jnp.einsum("...ij,...j->...i", rot, gaussians.means) + mats[..., None, :3, 3]
    quats = jnp.broadcast_to(rotmat_to_quat(mats[..., :3, :3])[..., None, :], gaussians.quats.shape)
    return gaussians._replace(means=means, quats=quat_multiply(quats, gaussians.quats))
