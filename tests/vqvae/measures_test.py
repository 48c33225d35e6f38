"""Measures of steadiness and of Gaussians, on pictures and Gaussians made for the purpose."""

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax import geometry
from fourdstar_jax.perceptual.lpips import LPIPS, NETWORKS
from fourdstar_jax.perceptual.weights import Conv
from fourdstar_jax.vqvae import decoder, losses, measures

T, V, SIZE = 3, 2, 24


def pictures():
    rng = np.random.default_rng(0)
    images = rng.random((2, T, V, SIZE, SIZE, 3)).astype(np.float32)
    masks = np.zeros((2, T, V, SIZE, SIZE, 1), np.float32)
    masks[:, :, :, 4:12, 4:12] = 1
    return images, masks


def test_temporal_error_is_of_changes_inside_the_mask():
    images, masks = pictures()
    np.testing.assert_allclose(losses.temporal_error(images + 0.2, images, masks), 0, atol=1e-6)
    wrong = images.copy()
    wrong[1, 1, :, 4:12, 4:12] += 0.3  # both changes of the middle timestep
    wrong[:, 1, :, 20:] += 7.0  # outside
    np.testing.assert_allclose(losses.temporal_error(wrong, images, masks), [0, 0.3], atol=1e-6)
    moved = masks.copy()
    moved[:, 1] = 0
    moved[:, 1, :, 12:20, 4:12] = 1  # seen before or after counts
    np.testing.assert_allclose(losses.temporal_error(wrong, images, moved), [0, 0.15], atol=1e-6)


def test_temporal_lpips_is_of_distances_in_time():
    rng = np.random.default_rng(1)
    stages = NETWORKS["VGG16"].stages
    widths = [3, *[4] * sum(stages)]
    convs = [
        Conv(jnp.asarray(rng.normal(0, 0.2, (3, 3, a, b)), jnp.float32), jnp.zeros(b))
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    lpips = LPIPS(tuple(convs), (jnp.ones(4),) * len(stages))
    images, _ = pictures()
    found = jax.jit(measures.temporal_lpips)
    np.testing.assert_allclose(found(lpips, images, images), 0, atol=1e-6)
    still = jnp.broadcast_to(images[:, :1], images.shape)
    images = jnp.asarray(images)
    distance = np.asarray(
        jax.jit(lambda lpips, *both: lpips(*both))(lpips, images[:, :-1], images[:, 1:])
    ).mean((1, 2))
    assert np.all(distance > 1e-3)
    np.testing.assert_allclose(found(lpips, still, images), distance, rtol=1e-4)


def test_statistics_of_known_gaussians():
    """Half of the pixels have an opaque Gaussian 0.05 before the surface, the others fog."""
    cameras = geometry.orbit_cameras([0, 90], width=SIZE, height=SIZE)
    cameras = jax.tree.map(lambda a: jnp.asarray(a)[None], cameras)
    m = SIZE // 2
    depth = jnp.zeros((1, T, V, SIZE, SIZE, 1)).at[..., : SIZE // 2, :].set(1.3)
    own = losses.OwnPixels(cameras, (depth > 0).astype(jnp.float32), depth)
    raw = jnp.zeros((1, T, V, m, m, decoder.NUM_CHANNELS))
    raw = raw.at[..., decoder.XYZ.start + 2].set((1.25 - 1.5) / decoder.XYZ_UNIT)
    top = (jnp.arange(m) < m // 2)[:, None]
    raw = raw.at[..., decoder.OPACITY].set(jnp.where(top, 4.0, -4.0))
    gaussians = decoder.activate(raw, cameras, resolution=SIZE)
    scales = gaussians.scales.at[...].set(jnp.array([0.02, 0.01, 0.04]))
    gaussians = gaussians._replace(scales=scales)
    found = jax.jit(lambda g: measures.gaussian_statistics(g, own, resolution=SIZE))(gaussians)
    np.testing.assert_allclose(found["opacity_0"], 0.5)
    np.testing.assert_allclose(found["opacity_4"], 0.5)
    assert found["opacity_1"] == found["opacity_2"] == found["opacity_3"] == 0
    np.testing.assert_allclose(found["scale_median"], 0.02, rtol=1e-5)
    np.testing.assert_allclose(found["scale_ratio_median"], 4, rtol=1e-5)
    np.testing.assert_allclose(found["depth_error"], 0.05, rtol=1e-4)
    np.testing.assert_allclose(found["covered"], 0.5)  # the mask is the left half
    # nearer along the camera's axis: 1.2 times as far from the middle, so 10 of 12 pixels stay
    np.testing.assert_allclose(found["outside"], 1 - (10 / 12) ** 2, rtol=1e-5)

    away = gaussians._replace(
        means=gaussians.means + jnp.array([0.0, 9.0, 0.0]), opacities=0 * gaussians.opacities
    )
    found = measures.gaussian_statistics(away, own, resolution=SIZE)
    assert found["outside"] == 1 and found["covered"] == 0 and found["depth_error"] == 1
