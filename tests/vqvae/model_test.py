import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import geometry, nn
from fourdstar_jax.types import Cameras
from fourdstar_jax.vqvae import losses
from fourdstar_jax.vqvae.decoder import NUM_CHANNELS, activate, in_parts
from fourdstar_jax.vqvae.model import VQVAE4D, canonical_frame
from fourdstar_jax.vqvae.offsets import Conv3d, OffsetPredictor

SIZE = 24
SMALLEST = dict(
    resolution=SIZE,
    grid=3,
    code_dim=6,
    dim=12,
    num_blocks=2,
    num_heads=3,
    hidden_dim=20,
    view_attention_every=2,
    up_channels=(10,),
    offset_dim=8,
    offset_layers=1,
    offset_heads=2,
    offset_features=True,
    offset_scaled=True,
    unet_channels=(5, 7),
    unet_blocks=1,
)
TINY = dict(
    resolution=64,
    grid=4,
    code_dim=16,
    dim=64,
    num_blocks=2,
    num_heads=4,
    hidden_dim=128,
    view_attention_every=2,
    up_channels=(64, 32),
    offset_dim=48,
    offset_layers=1,
    offset_heads=4,
    offset_features=True,
    offset_scaled=True,
    unet_channels=(8, 16),
    unet_blocks=1,
)


def build(**changes):
    return nn.build(VQVAE4D, jax.random.key(0), **{**SMALLEST, **changes})


@functools.cache
def fresh():
    return build()


@functools.cache
def awoken():
    return awake(build())


def rig(batch, azimuths, size=SIZE, **kwargs):
    cameras = geometry.orbit_cameras(azimuths, width=size, height=size, **kwargs)
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (batch, *a.shape)), cameras)


def inputs(batch=2, timesteps=3, views=2, model=SMALLEST):
    codes = jax.random.normal(
        jax.random.key(1), (batch, timesteps, views, model["grid"] ** 2, model["code_dim"])
    )
    times = jnp.broadcast_to(jnp.arange(float(timesteps)), (batch, timesteps))
    return codes, rig(batch, [0, 75, 200, 290][:views], model["resolution"]), times


def awake(model):
    """The model with the offset predictor's last convolution no longer zero."""
    graphdef, state = nnx.split(model)
    kernel = state["offsets"]["unet"]["out"]["kernel"]
    noise = 0.1 * jax.random.normal(jax.random.key(9), kernel.shape)
    state["offsets"]["unet"]["out"]["kernel"] = kernel.replace(noise)
    return nnx.merge(graphdef, state)


@jax.jit
def run(model, codes, cameras, times):
    return model(codes, cameras, times)


def assert_close(a, b, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0)


@pytest.mark.parametrize(("timesteps", "views"), [(3, 2), (1, 1), (1, 3)])
def test_any_number_of_timesteps_and_views(timesteps, views):
    out = run(fresh(), *inputs(2, timesteps, views))
    num = views * 36
    for gaussians in out:
        assert gaussians.means.shape == (2, timesteps, num, 3)
        assert gaussians.quats.shape == (2, timesteps, num, 4)
        assert gaussians.scales.shape == (2, timesteps, num, 3)
        assert gaussians.opacities.shape == (2, timesteps, num)
        assert gaussians.colors.shape == (2, timesteps, num, 3)


def test_a_timestep_is_the_same_alone():
    model = awoken()
    codes, cameras, times = inputs()
    three = run(model, codes, cameras, times)
    # The static Gaussians of a timestep are the same alone and in company.
    alone = run(model, codes[:, 1:2], cameras, times[:, 1:2])
    assert_close(jax.tree.map(lambda a: a[:, 1:2], three.coarse), alone.coarse)


@pytest.mark.central
def test_offsets_start_at_zero():
    out = run(fresh(), *inputs())
    for a, b in zip(out.coarse, out.gaussians, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_model_without_offsets_is_coarse():
    """The static half and nothing else: both Gaussians are the same arrays."""
    model = build(offsets=False)
    out = jax.eval_shape(lambda *x: model(*x), *inputs())
    assert out.gaussians is not None and not hasattr(nnx.state(model, nnx.Param), "offsets")
    with_them = nnx.state(fresh().static, nnx.Param)
    assert nn.count_parameters(model) == nn.count_parameters(with_them)


def test_offsets_change_what_they_should():
    out = run(awoken(), *inputs())
    for a, b in zip(out.coarse, out.gaussians, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3


def test_activations_stay_in_range():
    raw = 30 * jax.random.normal(jax.random.key(2), (2, 1, 2, 5, 5, NUM_CHANNELS))
    gaussians = activate(raw, rig(2, [0, 90]), resolution=SIZE)
    assert np.all(np.abs(gaussians.means) <= 1)
    assert np.all((np.asarray(gaussians.opacities) >= 0) & (np.asarray(gaussians.opacities) <= 1))
    assert np.all((np.asarray(gaussians.colors) >= 0) & (np.asarray(gaussians.colors) <= 1))
    assert np.all(np.asarray(gaussians.scales) >= 0)
    np.testing.assert_allclose(np.linalg.norm(gaussians.quats, axis=-1), 1, rtol=1e-5)


def test_scales_stay_within_their_limits():
    cameras = rig(2, [0, 90])
    raw = 40 * jax.random.normal(jax.random.key(0), (2, 1, 2, 8, 8, 14))
    start = activate(0 * raw, cameras, resolution=SIZE)
    same = activate(0 * raw, cameras, resolution=SIZE, scale_limits=(1 / 3, 4.0))
    np.testing.assert_allclose(same.scales, start.scales, rtol=1e-5)
    found = activate(raw, cameras, resolution=SIZE, scale_limits=(1 / 3, 4.0)).scales
    ratio = found / start.scales
    np.testing.assert_allclose([ratio.min(), ratio.max()], [1 / 3, 4.0], rtol=1e-3)
    with pytest.raises(ValueError, match="scale_limits=.* below 1 and one above"):
        build(scale_limits=(2.0, 4.0))


def test_zero_map_lies_on_the_rays_at_the_origins_depth():
    size, m = 24, 6
    cameras = rig(1, [0, 130], size, radius=2.0, fov_deg=40.0)
    raw = jnp.zeros((1, 1, 2, m, m, NUM_CHANNELS))
    gaussians = activate(raw, cameras, resolution=size)
    means = np.asarray(gaussians.means).reshape(2, m * m, 3)
    viewmats = np.asarray(cameras.viewmats)[0]
    for v in range(2):
        local = means[v] @ viewmats[v, :3, :3].T + viewmats[v, :3, 3]
        np.testing.assert_allclose(local[:, 2], 2.0, atol=1e-5)
    pixels = losses.project_points(gaussians.means[0], Cameras(*(a for a in cameras)))[0]
    centres = (np.arange(m) + 0.5) * size / m
    grid = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    for v in range(2):
        np.testing.assert_allclose(pixels[v].reshape(2, -1, 2)[v], grid, atol=1e-3)
    half_spacing = 2.0 * np.tan(np.deg2rad(20)) / m
    np.testing.assert_allclose(gaussians.scales, half_spacing, rtol=1e-4)


@pytest.mark.parametrize("map_levels", [(64, 32), (64, 32, 16)])
def test_transmittance_at_the_start(map_levels):
    """Neither fog nor holes, whatever the map's size."""
    config = {**TINY, "up_channels": map_levels}
    model = build(**config)
    codes, _, times = inputs(1, 1, 4, config)
    cameras = rig(1, [0, 90, 180, 270], 64)
    coarse = run(model, codes, cameras, times).coarse
    alphas = losses.render(coarse, cameras, width=64, height=64).alphas[0, 0, ..., 0]
    row, column = np.mgrid[:64, :64] + 0.5
    radius = 0.45 * 64 / (2 * 1.5 * np.tan(np.deg2rad(49.1 / 2)))  # the object's half extent
    centre = np.hypot(row - 32, column - 32) < radius
    transmittance = 1 - np.asarray(alphas)[:, centre].mean()
    assert 0.1 < transmittance < 0.7


def test_objects_of_a_batch_do_not_meet():
    model = awoken()
    codes, cameras, times = inputs()
    order = jnp.array([1, 0])
    out = run(model, codes, cameras, times)
    permuted = run(model, codes[order], cameras, times)
    assert_close(permuted, jax.tree.map(lambda a: a[order], out))


@pytest.mark.central
def test_timesteps_meet_in_the_offsets_only():
    model = awoken()
    codes, cameras, times = inputs()
    out = run(model, codes, cameras, times)
    other = run(model, codes.at[0, 1, 0].add(10.0), cameras, times)

    def moved(a, b):  # [T, V]; what does not meet stays the same to the bit
        change = np.abs(np.asarray(a.means) - np.asarray(b.means))[0].reshape(3, 2, -1)
        return change.max(axis=-1) > 0

    np.testing.assert_array_equal(
        moved(out.coarse, other.coarse), [[False] * 2, [True] * 2, [False] * 2]
    )
    assert moved(out.gaussians, other.gaussians)[:, 0].all()


def test_frame_times_matter_and_their_zero_does_not_move_the_static_ones():
    model = awoken()
    codes, cameras, times = inputs()
    slow = run(model, codes, cameras, 5 * times)
    out = run(model, codes, cameras, times)
    assert np.abs(np.asarray(slow.gaussians.means - out.gaussians.means)).max() > 1e-5
    assert_close(slow.coarse, out.coarse, atol=0)


def test_gaussians_turn_with_the_rig():
    model = awoken()
    codes, cameras, times = inputs()
    turn = geometry.quat_to_rotmat(jnp.array([0.6, -0.3, 0.5, 0.4]))
    turn = jnp.eye(4).at[:3, :3].set(turn)
    turned = cameras._replace(viewmats=cameras.viewmats @ turn.T)
    wanted = geometry.transform_gaussians(run(model, codes, cameras, times).gaussians, turn)
    got = run(model, codes, turned, times).gaussians
    assert_close(got._replace(quats=0.0), wanted._replace(quats=0.0), atol=1e-4)
    same = np.abs(np.sum(np.asarray(got.quats) * np.asarray(wanted.quats), axis=-1))
    np.testing.assert_allclose(same, 1, atol=1e-4)


def test_a_map_moves_rigidly_with_its_camera():
    """Position residuals and rotations are in the camera's axes."""
    raw = 0.3 * jax.random.normal(jax.random.key(3), (1, 1, 1, 5, 5, NUM_CHANNELS))
    turn = geometry.quat_to_rotmat(jnp.array([0.9, 0.1, 0.5, -0.2]))
    turn = jnp.eye(4).at[:3, :3].set(turn)
    cameras = rig(1, [0])
    wanted = geometry.transform_gaussians(activate(raw, cameras, resolution=SIZE), turn)
    turned = cameras._replace(viewmats=cameras.viewmats @ turn.T)
    got = activate(raw, turned, resolution=SIZE)
    np.testing.assert_allclose(got.means, wanted.means, atol=1e-5)
    same = np.abs(np.sum(np.asarray(got.quats) * np.asarray(wanted.quats), axis=-1))
    np.testing.assert_allclose(same, 1, atol=1e-5)


def test_canonical_frame_leaves_a_relative_rig_alone():
    cameras = rig(2, [0, 90, 250])
    turned, back = canonical_frame(cameras)
    np.testing.assert_allclose(turned.viewmats, cameras.viewmats, atol=1e-6)
    np.testing.assert_allclose(back, np.broadcast_to(np.eye(4), (2, 4, 4)), atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        pytest.param(
            dict(up="nearest", offset_features=False, offset_scaled=False), marks=pytest.mark.slow
        ),
        pytest.param(
            dict(up="hybrid", up_channels=(10, 8), up_depths=(2,), offset_attention="axial_time"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_parameter_learns(changes):
    model = awake(build(**changes))
    codes, cameras, times = inputs()
    target = jax.random.normal(jax.random.key(5), (5,))

    def loss(model):
        out = model(codes, cameras, times)
        parts = [jnp.sum(jnp.sin(37.0 * a) * t) for a, t in zip(out.gaussians, target, strict=True)]
        return sum(parts)

    grads = jax.jit(jax.grad(loss))(model)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(grads, nnx.Param)))
    dead = [jax.tree_util.keystr(path) for path, grad in leaves if not np.any(grad)]
    assert len(leaves) > 100 and not dead


def test_one_step_wakes_everything_from_the_real_start():
    """With the zero-initialised last convolution, all learn from the second step on."""
    model = build()
    codes, cameras, times = inputs(1, 2, 2)
    batch = dict(
        images=jax.random.uniform(jax.random.key(4), (1, 2, 2, SIZE, SIZE, 3)),
        masks=jnp.ones((1, 2, 2, SIZE, SIZE, 1)),
        viewmats=cameras.viewmats,
        Ks=cameras.Ks,
    )

    @jax.jit
    def gradients(model):
        def loss(model):
            supervision = losses.choose_supervision(
                jax.random.key(0), batch, num_timesteps=2, rig_views=2, extra_views=0
            )
            return losses.reconstruction_loss(model(codes, cameras, times), supervision)

        grads, metrics = jax.grad(loss, has_aux=True)(model)
        return jax.tree.map(lambda p, g: p - 0.1 * g, model, grads), grads, metrics

    model, _, first = gradients(model)
    _, grads, second = gradients(model)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(grads, nnx.Param)))
    dead = [jax.tree_util.keystr(path) for path, grad in leaves if not np.any(grad)]
    assert not dead
    assert second["loss"] < first["loss"] and not first["overflow"]


@pytest.mark.slow
def test_less_memory_changes_nothing():
    """Blocks made again and an up path in parts, values and gradients."""
    args = inputs(2, 3, 2)

    def loss(model):
        out = model(*args)
        return sum(jnp.sum(jnp.sin(3.0 * a)) for a in jax.tree.leaves(out)), out

    def run(**changes):
        grads, out = jax.jit(jax.grad(loss, has_aux=True))(awake(build(num_blocks=3, **changes)))
        return out, jax.tree.leaves(grads)

    out, grads = run()
    less = run(remat=True, up_pictures=4)  # in parts of 3 of the 6 pictures
    for x, y in zip(jax.tree.leaves(out), jax.tree.leaves(less[0]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    scale = max(np.abs(g).max() for g in grads)
    for x, y in zip(grads, less[1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_parts_are_the_whole(size):
    x, w = jax.random.normal(jax.random.key(3), (2, 6, 5)), jnp.arange(1.0, 6.0)

    def whole(x, w, size):
        out = in_parts(lambda x: (jnp.sin(x * w), jnp.sum(x, -1)), size, x)
        return jnp.sum(out[0] ** 3) + jnp.sum(out[1] ** 2), out

    wanted, got = (
        jax.grad(functools.partial(whole, size=s), (0, 1), has_aux=True)(x, w) for s in (None, size)
    )
    assert got[1][0].shape == (2, 6, 5) and got[1][1].shape == (2, 6)
    assert_close(got, wanted)


@pytest.mark.parametrize("num_blocks", [1, 2, 5])
def test_stacked_blocks_are_blocks_one_after_the_other(num_blocks):
    """A view attention follows every second one; there may be none, and blocks may be left."""
    decoder = build(num_blocks=num_blocks).static

    def layer(layers, i):
        return jax.tree.map(lambda w: w[i], layers)

    x = jax.random.normal(jax.random.key(3), (6, 9, 12))
    wanted = x
    for i in range(num_blocks):
        wanted = layer(decoder.blocks, i)(wanted)
        if i % 2 == 1:
            meet = layer(decoder.view_attentions, i // 2)
            wanted = meet(wanted.reshape(2, 3, 9, 12)).reshape(wanted.shape)
    found = jax.jit(lambda decoder, x: decoder._blocks(x, 3))(decoder, x)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_conv3d_is_a_3d_convolution():
    layer = Conv3d(3, 5, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 7, 3))
    wanted = jax.lax.conv_general_dilated(
        x,
        layer.kernel[...],
        (1, 1, 1),
        ((1, 1),) * 3,
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    np.testing.assert_allclose(layer(x), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(resolution=25), "resolution"),
        (dict(offset_dim=10), "dim"),
        (dict(unet_channels=(5, 7, 9)), "map_size"),
        (dict(up_pictures=0), "up_pictures=0 must be positive"),
    ],
)
def test_bad_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_inputs_that_do_not_fit_are_named():
    model = fresh()
    codes, cameras, times = inputs(1, 2, 2)
    with pytest.raises(ValueError, match="tokens a view"):
        model(codes[..., :4, :], cameras, times)
    with pytest.raises(ValueError, match="cameras for 2 views"):
        model(codes, rig(1, [0, 90, 180]), times)


def test_offset_predictor_says_what_it_needs():
    with pytest.raises(ValueError, match="map_size"):
        OffsetPredictor(
            4,
            10,
            6,
            0,
            dim=8,
            num_layers=1,
            num_heads=2,
            unet_channels=(5, 7),
            unet_blocks=1,
            rngs=nnx.Rngs(0),
        )
