import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.types import Gaussians
from fourdstar_jax.vqvae import decoder, losses
from fourdstar_jax.vqvae.model import Decoded

B, T, V, E, SIZE = 2, 5, 3, 2, 24


def rig(azimuths, size=SIZE, batch=B):
    cameras = geometry.orbit_cameras(azimuths, width=size, height=size)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), cameras)


def numbered_batch(extra=True):
    """A picture of timestep t and view v is t + v / 10 everywhere (+ b / 100)."""

    def pictures(views, channels):
        b, t, v = np.meshgrid(range(B), range(T), views, indexing="ij")
        values = (t + v / 10 + b / 100).astype(np.float32)
        return jnp.asarray(
            np.broadcast_to(values[..., None, None, None], (*values.shape, 4, 4, channels))
        )

    cameras = rig([0, 120, 240, 10, 20])
    batch = dict(
        images=pictures(range(V), 3),
        masks=pictures(range(V), 1),
        viewmats=cameras.viewmats[:, :V],
        Ks=cameras.Ks[:, :V],
        flow=pictures(range(V), 2)[:, :-1],
    )
    if extra:
        batch |= dict(
            extra_images=pictures(range(V, V + E), 3),
            extra_masks=pictures(range(V, V + E), 1),
            extra_viewmats=cameras.viewmats[:, V:],
            extra_Ks=cameras.Ks[:, V:],
        )
    return batch, cameras


def moving_cloud(shift, timesteps=2, num=40, radius=0.3):
    """A solid ball of Gaussians that moves by `shift` each timestep: [1, T, G, ...]."""
    keys = jax.random.split(jax.random.key(0), 2)
    points = geometry.normalize(jax.random.normal(keys[0], (num, 3)))
    points = radius * points * jax.random.uniform(keys[1], (num, 1)) ** (1 / 3)
    steps = jnp.arange(timesteps)[:, None, None]
    means = points + steps * jnp.asarray(shift)

    def same(a):
        return jnp.broadcast_to(a, (1, timesteps, *a.shape))

    return Gaussians(
        means=means[None],
        quats=same(jnp.tile(jnp.array([1.0, 0, 0, 0]), (num, 1))),
        scales=same(jnp.full((num, 3), 0.06)),
        opacities=same(jnp.full(num, 0.9)),
        colors=same(jax.random.uniform(jax.random.key(1), (num, 3))),
    )


def test_supervision_pictures_belong_to_their_indices():
    batch, cameras = numbered_batch()
    seen = set()
    counts = dict(num_timesteps=2, rig_views=2, extra_views=1)
    choose = jax.jit(losses.choose_supervision, static_argnames=tuple(counts))
    for i in range(30):
        s = choose(jax.random.key(i), batch, **counts)
        assert s.images.shape == (B, 2, 3, 4, 4, 3) and s.masks.shape == (B, 2, 3, 4, 4, 1)
        t, v = np.asarray(s.timesteps), np.asarray(s.views)
        np.testing.assert_array_equal(t[:, 1], t[:, 0] + 1)
        wanted = t[:, :, None] + v[:, None] / 10 + np.arange(B)[:, None, None] / 100
        np.testing.assert_allclose(s.images[..., 0, 0, 0], wanted, rtol=1e-6)
        np.testing.assert_allclose(s.masks[..., 3, 3, 0], wanted, rtol=1e-6)
        for b in range(B):
            assert len(set(v[b])) == 3 and np.sum(v[b] < V) == 2
            np.testing.assert_array_equal(s.cameras.viewmats[b], cameras.viewmats[b, v[b]])
        known = v < V
        np.testing.assert_array_equal(s.flow_known, known)
        np.testing.assert_allclose(
            s.flow[:, 0, :, 0, 0, 0], np.where(known, wanted[:, 0], 0), rtol=1e-6
        )
        seen |= {(b, int(v)) for b in range(B) for v in s.views[b]}
        seen |= {("t", int(t)) for t in t.ravel()}
    assert len(seen) == B * (V + E) + T  # all of them come up


def test_supervision_takes_what_there_is():
    batch, _ = numbered_batch(extra=False)
    key = jax.random.key(0)
    s = losses.choose_supervision(key, batch, num_timesteps=9, rig_views=9, extra_views=9)
    assert s.images.shape[1:3] == (T, V) and s.own is None
    s = losses.choose_supervision(key, batch, num_timesteps=1, rig_views=2, extra_views=0)
    assert s.flow is None and not np.any(s.flow_known)


def test_taken_timesteps():
    cloud = moving_cloud([0.1, 0, 0], timesteps=5)
    taken = losses.take_timesteps(cloud, jnp.array([[3, 4]]))
    np.testing.assert_array_equal(taken.means, cloud.means[:, 3:5])
    np.testing.assert_array_equal(taken.opacities, cloud.opacities[:, 3:5])


def test_own_render_has_no_loss():
    cloud = moving_cloud([0.1, 0, 0])
    cameras = rig([0, 90], batch=1)
    rendered = losses.render(cloud, cameras, width=SIZE, height=SIZE)
    assert rendered.renders.shape == (1, 2, 2, SIZE, SIZE, 3)
    batch = dict(
        images=rendered.renders,
        masks=rendered.alphas,
        viewmats=cameras.viewmats,
        Ks=cameras.Ks,
        flow=jnp.zeros((1, 1, 2, SIZE, SIZE, 2)),
    )
    counts = dict(num_timesteps=2, rig_views=2, extra_views=0)
    s = losses.choose_supervision(jax.random.key(1), batch, **counts)
    faded = cloud._replace(opacities=0.5 * cloud.opacities)
    loss, metrics = losses.reconstruction_loss(Decoded(faded, cloud), s)
    assert metrics["rgb"] < 1e-10 and metrics["alpha"] < 1e-10 and metrics["psnr"] > 90
    np.testing.assert_allclose(
        loss, 0.5 * (metrics["coarse_rgb"] + metrics["coarse_alpha"]), rtol=1e-5
    )
    assert metrics["coarse_alpha"] > 1e-3 and not metrics["overflow"]
    assert "flow" not in metrics and "warp" not in metrics
    total, metrics = losses.reconstruction_loss(
        Decoded(faded, cloud), s, flow_weight=0.05, warp_weight=0.3
    )
    np.testing.assert_allclose(
        total, loss + 0.05 * metrics["flow"] + 0.3 * metrics["warp"], rtol=1e-5
    )
    _, metrics = losses.reconstruction_loss(Decoded(faded, cloud), s, capacity=1)
    assert metrics["overflow"]
    total, metrics = losses.reconstruction_loss(Decoded(faded, faded), s, temporal_weight=0.2)
    assert "coarse_rgb" not in metrics and metrics["temporal"] > 1e-4  # one and the same
    np.testing.assert_allclose(
        total, metrics["rgb"] + metrics["alpha"] + 0.2 * metrics["temporal"], rtol=1e-5
    )
    later, _ = losses.reconstruction_loss(Decoded(faded, cloud), s, progress=1.0)
    np.testing.assert_allclose(later, loss / 5, rtol=1e-5)  # the coarse weight goes down to 0.1
    with pytest.raises(ValueError, match="lpips_weight=0.2 needs the network"):
        losses.reconstruction_loss(Decoded(faded, cloud), s, lpips_weight=0.2)
    with pytest.raises(ValueError, match="own_depth_weight needs data with depth"):
        losses.reconstruction_loss(Decoded(faded, cloud), s, own_depth_weight=(1, 0, 0.5))


def test_weights_move_in_a_straight_line_and_stay():
    weight = losses.Annealed(1.0, 0.2, 0.5)
    found = [float(weight.at(progress)) for progress in (0, 0.25, 0.5, 0.9)]
    np.testing.assert_allclose(found, [1.0, 0.6, 0.2, 0.2], rtol=1e-6)


def test_own_pixels_want_an_opaque_surface():
    """Gaussians at a known place of their pixels' rays, under a mask of half of the pictures."""
    cameras, m = rig([0, 90], batch=1), SIZE // 2
    depth = jnp.zeros((1, 2, 2, SIZE, SIZE, 1)).at[..., : SIZE // 2, :].set(1.3)
    own = losses.OwnPixels(cameras, (depth > 0).astype(jnp.float32), depth)
    raw = jnp.zeros((1, 2, 2, m, m, 14))
    raw = raw.at[..., decoder.XYZ.start + 2].set((1.25 - 1.5) / decoder.XYZ_UNIT)
    covered = jnp.arange(m)[:, None] * 0 + (jnp.arange(m) < m // 2)
    raw = raw.at[..., decoder.OPACITY].set(jnp.where(covered, 12.0, -12.0))
    gaussians = decoder.activate(raw, cameras, resolution=SIZE)
    error, entropy = losses.own_pixel_losses(gaussians, own)
    np.testing.assert_allclose(error, 0.05, rtol=1e-4)
    assert entropy < 2e-4
    fog = gaussians._replace(opacities=0.5 + 0 * gaussians.opacities)
    _, entropy = losses.own_pixel_losses(fog, own)
    np.testing.assert_allclose(entropy, np.log(2), rtol=1e-5)
    nothing = losses.OwnPixels(cameras, 0 * own.masks, 0 * own.depth)
    for gradient in jax.tree.leaves(
        jax.grad(lambda g: sum(losses.own_pixel_losses(g, nothing)))(gaussians)
    ):
        assert np.isfinite(gradient).all()


def test_foreground_counts_more():
    rendered = losses.render(moving_cloud([0, 0, 0]), rig([0], batch=1), width=SIZE, height=SIZE)
    masks = jnp.zeros((1, 2, 1, SIZE, SIZE, 1)).at[..., :12, :, :].set(1.0)
    images = rendered.renders + masks  # wrong by 1 in the upper half
    rgb, _ = losses.pixel_losses(rendered, images, masks)
    np.testing.assert_allclose(rgb, 0.5, rtol=1e-5)
    rgb, _ = losses.pixel_losses(rendered, images, masks, foreground_weight=3.0)
    np.testing.assert_allclose(rgb, 0.8, rtol=1e-5)


def test_projection_hits_pixels():
    cameras = geometry.orbit_cameras([0, 90], width=SIZE, height=SIZE)
    points = jnp.array([[0.0, 0, 0], [0.1, 0.2, 0.3]])
    pixels = losses.project_points(points, jax.tree.map(jnp.asarray, cameras))
    np.testing.assert_allclose(pixels[:, 0], 12, atol=1e-5)
    focal = cameras.Ks[0, 0, 0]
    np.testing.assert_allclose(pixels[0, 1], 12 + focal * np.array([0.1, -0.2]) / 1.2, rtol=1e-5)
    np.testing.assert_allclose(pixels[1, 1], 12 + focal * np.array([-0.3, -0.2]) / 1.4, rtol=1e-5)


def test_splatted_flow_of_a_sideways_motion():
    """Everything at depth 1.5 that moves by 0.1 to the right: f * 0.1 / 1.5 pixels in view 0."""
    cloud = moving_cloud([0.1, 0.0, 0.0])
    cloud = cloud._replace(means=cloud.means.at[..., 2].set(0.0))
    cameras = rig([0, 180], batch=1)
    flow, weight = losses.splatted_flow(cloud, cameras, width=SIZE, height=SIZE)
    assert flow.shape == (1, 1, 2, SIZE, SIZE, 2)
    pixels = float(cameras.Ks[0, 0, 0, 0]) * 0.1 / 1.5
    solid = np.asarray(weight)[0, 0, :, ..., 0] > 0.5
    assert solid.sum() > 20
    np.testing.assert_allclose(np.asarray(flow)[0, 0, 0][solid[0]][:, 0], pixels, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(flow)[0, 0, 1][solid[1]][:, 0], -pixels, rtol=1e-3)
    np.testing.assert_allclose(np.asarray(flow)[0, 0][solid][:, 1], 0, atol=1e-4)


def test_vanishing_gaussians_have_no_flow():
    cloud = moving_cloud([0.1, 0, 0])
    gone = cloud._replace(opacities=cloud.opacities.at[:, 1].set(0.0))
    _, weight = losses.splatted_flow(gone, rig([0], batch=1), width=SIZE, height=SIZE)
    assert np.max(weight) == 0


def test_flow_loss_values_and_gradient():
    target = jnp.zeros((1, 1, 2, 4, 10, 2)).at[..., 0].set(0.5)
    flow = target.at[..., 1].add(2.0)
    ones = jnp.ones((1, 1, 2, 4, 10, 1))
    known = jnp.array([[1.0, 0.0]])
    loss = losses.flow_loss(flow, ones, target, ones, known)
    np.testing.assert_allclose(loss, 0.2, rtol=1e-6)  # 2 pixels of 10
    assert losses.flow_loss(flow, ones, target, ones, jnp.zeros((1, 2))) == 0
    assert losses.flow_loss(flow, ones, 9 * target, ones, known) == 0  # too fast to count
    cloud = moving_cloud([0.1, 0, 0])

    def of(shift):
        moved = cloud._replace(means=cloud.means.at[:, 1, :, 0].add(shift))
        flow, weight = losses.splatted_flow(moved, rig([0], batch=1), width=SIZE, height=SIZE)
        masks = jnp.ones_like(weight)
        still = jnp.zeros_like(flow)
        return losses.flow_loss(flow, weight, still, masks, jnp.ones((1, 1)))

    assert of(-0.1) < 1e-5 < of(0.0)
    assert jax.grad(of)(0.0) > 0  # moving less is better


def test_bilinear_sampling():
    images = jnp.arange(12.0).reshape(3, 4, 1)
    x, y = jnp.meshgrid(jnp.arange(4) + 0.5, jnp.arange(3) + 0.5)
    xy = jnp.stack([x, y], axis=-1)
    np.testing.assert_allclose(losses.sample_bilinear(images, xy), images, atol=1e-6)
    halfway = losses.sample_bilinear(images, xy + jnp.array([0.5, 0.25]))
    np.testing.assert_allclose(halfway[0, 0, 0], 0.5 + 1.0, atol=1e-6)
    np.testing.assert_allclose(halfway[2, 3, 0], 11, atol=1e-6)  # the edge is repeated


def test_warp_loss_sees_flicker_only():
    rng = np.random.default_rng(0)
    first = rng.uniform(size=(1, 1, 1, 8, 8, 3)).astype(np.float32)
    second = np.roll(first, 2, axis=-2)  # two pixels to the right
    images = jnp.concatenate([jnp.asarray(first), jnp.asarray(second)], axis=1)
    masks = jnp.ones((1, 2, 1, 8, 8, 1))
    flow = jnp.zeros((1, 1, 1, 8, 8, 2)).at[..., 0].set(2.0)
    known = jnp.ones((1, 1))
    assert losses.warp_loss(images, images, masks, flow, known) < 1e-6
    darker = images.at[:, 1].add(-0.3)
    np.testing.assert_allclose(losses.warp_loss(darker, images, masks, flow, known), 0.3, rtol=1e-4)
    shaded = images.at[:, 1].add(-0.05)  # the true picture gets darker, the render has to follow
    assert losses.warp_loss(shaded, shaded, masks, flow, known) < 1e-6
    np.testing.assert_allclose(
        losses.warp_loss(images, shaded, masks, flow, known), 0.05, rtol=1e-4
    )
    # A constant error is no flicker; an occluded pixel (another true colour) does not count.
    assert losses.warp_loss(images - 0.3, images, masks, flow, known) < 1e-6
    occluded = images.at[:, 1, :, 4, 4].add(0.5)
    assert losses.warp_loss(occluded, occluded, masks, flow, known) < 1e-6
    assert losses.warp_loss(occluded, images, masks, flow, known) > 1e-3
