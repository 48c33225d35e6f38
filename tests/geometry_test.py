"""Cameras, rays, quaternions: conventions pinned by numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.types import Gaussians

pytestmark = pytest.mark.central


def random_quats(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 4)).astype(np.float32)


def test_orbit_places_azimuth_0_on_z_90_on_x_and_negative_elevation_above():
    cameras = geometry.orbit_cameras([0, 90, 0], [0, 0, -90 + 1e-3], radius=2, width=5, height=7)
    positions = np.asarray(geometry.invert_rigid(cameras.viewmats))[:, :3, 3]
    np.testing.assert_allclose(positions, [[0, 0, 2], [2, 0, 0], [0, 2, 0]], atol=1e-4)


def test_orbit_cameras_look_at_the_origin_upright():
    cameras = geometry.orbit_cameras([0, 45, 200], [0, -20, 10], width=11, height=7)
    origin = np.asarray(cameras.viewmats)[:, :3, 3]
    np.testing.assert_allclose(origin, [[0, 0, 1.5]] * 3, atol=1e-6)  # straight ahead
    up = np.einsum("vij,j->vi", cameras.viewmats[:, :3, :3], [0, 1, 0])
    assert np.all(up[:, 1] < 0) and np.allclose(up[:, 0], 0, atol=1e-6)  # image y points down


@pytest.mark.parametrize(
    "more, told",
    [
        (dict(width=0), "^width=0 must be a whole number of at least 1"),
        (dict(height=8.5), "^height=8.5 must be a whole number of at least 1"),
        (dict(radius=-1), "^radius=-1 must be a number from 0.001"),
        (dict(fov_deg=180), "^fov_deg=180 must be a number from 0.1 to 179"),
        (dict(azimuths_deg=None), "^azimuths_deg=None must be finite numbers, in degrees"),
        (dict(azimuths_deg=["a"]), "^azimuths_deg=.'a'. must be finite numbers"),
        (dict(azimuths_deg=3.0), r"^azimuths_deg has shape \(\), elevations_deg \(\); \[V\]"),
        (dict(elevations_deg=[1, 2, 3]), r"^azimuths_deg has shape \(2,\), elevations_deg \(3,\)"),
    ],
)
def test_bad_orbits_are_told(more, told):
    with pytest.raises(ValueError, match=told):
        geometry.orbit_cameras(**dict(azimuths_deg=[0, 45], width=11, height=7) | more)


def test_field_of_view_spans_the_shorter_side():
    cameras = geometry.orbit_cameras([0], fov_deg=90, width=11, height=7)
    np.testing.assert_allclose(cameras.Ks[0], [[3.5, 0, 5.5], [0, 3.5, 3.5], [0, 0, 1]])


def test_camera_round_trip_projects_ray_points_back_to_their_pixels():
    width, height = 11, 7
    cameras = geometry.orbit_cameras([30, 140], [-10, 20], width=width, height=height)
    origins, directions = geometry.pixel_rays(cameras, width=width, height=height)
    points = np.asarray(origins + 1.7 * directions)
    local = np.einsum("vij,vhwj->vhwi", cameras.viewmats[:, :3, :3], points)
    local += cameras.viewmats[:, None, None, :3, 3]
    pixels = np.einsum("vij,vhwj->vhwi", cameras.Ks, local / local[..., 2:])[..., :2]
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    np.testing.assert_allclose(
        pixels, np.broadcast_to(np.stack([x, y], -1), pixels.shape), atol=1e-4
    )


def test_plucker_moment_does_not_depend_on_the_point_along_the_ray():
    cameras = geometry.orbit_cameras([30, 140], [-10, 20], width=5, height=3)
    rays = geometry.plucker_rays(cameras, width=5, height=3)
    origins, directions = geometry.pixel_rays(cameras, width=5, height=3)
    moved = jnp.cross(origins + 0.7 * directions, directions)
    np.testing.assert_allclose(rays[..., :3], moved, atol=1e-6)
    np.testing.assert_allclose(jnp.sum(rays[..., :3] * rays[..., 3:], -1), 0, atol=1e-6)


def test_a_rig_comes_back_from_json_and_sees_as_orbit_cameras():
    rig = geometry.Rig.around(3, fps=7.0)
    assert rig.num_views == 3 and rig.azimuths_deg == (0.0, 120.0, 240.0)
    assert geometry.Rig.from_dict(json.loads(json.dumps(rig.to_dict()))) == rig
    expected = geometry.orbit_cameras([0, 120, 240], width=5, height=5)
    for ours, wanted in zip(rig.cameras(5), expected, strict=True):
        np.testing.assert_array_equal(ours, wanted)
    with pytest.raises(ValueError, match="fps"):
        geometry.Rig.from_dict({k: v for k, v in rig.to_dict().items() if k != "fps"})


def test_quaternions_round_trip_and_zero_is_the_identity():
    quats = random_quats(101)
    quats /= np.linalg.norm(quats, axis=-1, keepdims=True)
    again = geometry.rotmat_to_quat(geometry.quat_to_rotmat(quats))
    np.testing.assert_allclose(np.abs(np.sum(again * quats, -1)), 1, atol=1e-6)
    np.testing.assert_array_equal(geometry.quat_to_rotmat(jnp.zeros(4)), np.eye(3))
    grad = jax.grad(lambda q: geometry.quat_to_rotmat(q).sum())(jnp.zeros(4))
    assert np.all(np.isfinite(grad))


def test_quat_multiply_is_the_product_of_rotations():
    a, b = random_quats(13, 1), random_quats(13, 2)
    a /= np.linalg.norm(a, axis=-1, keepdims=True)
    b /= np.linalg.norm(b, axis=-1, keepdims=True)
    product = geometry.quat_to_rotmat(geometry.quat_multiply(a, b))
    expected = geometry.quat_to_rotmat(a) @ geometry.quat_to_rotmat(b)
    np.testing.assert_allclose(product, expected, atol=1e-5)


def test_transform_gaussians_moves_means_and_covariances():
    rng = np.random.default_rng(0)
    gaussians = Gaussians(
        means=jnp.asarray(rng.normal(size=(7, 3)), jnp.float32),
        quats=jnp.asarray(random_quats(7)),
        scales=jnp.asarray(rng.uniform(0.1, 1, size=(7, 3)), jnp.float32),
        opacities=jnp.ones(7),
        colors=jnp.ones((7, 3)),
    )
    mat = jnp.asarray(geometry.orbit_cameras([33], [-20], width=5, height=5).viewmats[0])

    def covariance(g):
        axes = geometry.quat_to_rotmat(g.quats) * g.scales[:, None, :]
        return axes @ jnp.swapaxes(axes, -1, -2)

    moved = geometry.transform_gaussians(gaussians, mat)
    rot = mat[:3, :3]
    np.testing.assert_allclose(moved.means, gaussians.means @ rot.T + mat[:3, 3], atol=1e-5)
    np.testing.assert_allclose(covariance(moved), rot @ covariance(gaussians) @ rot.T, atol=1e-5)
