"""The GPU kernels: by their twin in plain JAX here, by lowering, and on a GPU where there is one.

Their values and gradients are in rasterize_values_test.py, beside those of the others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import USERS_EMITTERS
from jax import lax
from jax.sharding import PartitionSpec as P

from fourdstar_jax import geometry
from fourdstar_jax.kernels.rasterize import api, rasterize
from fourdstar_jax.kernels.rasterize.pallas_gpu import lanes, spec
from fourdstar_jax.types import Cameras, Gaussians

WIDTH, HEIGHT, NUM = 37, 21, 53
# Compiling the twin takes most of this file's time.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
OPTIONS = dict(
    width=WIDTH, height=HEIGHT, near=0.01, far=np.inf, eps2d=0.3, antialiased=False,
    with_depths=False, implementation="pallas_gpu", interpret=True,
)  # fmt: skip


def random_gaussians(seed, *shape):
    rng = np.random.default_rng(seed)
    arrays = (
        rng.uniform(-0.5, 0.5, (*shape, 3)),
        rng.standard_normal((*shape, 4)),
        0.06 * np.exp(rng.uniform(-1, 1, (*shape, 3))),
        rng.uniform(0.1, 0.9, shape),
        rng.uniform(0, 1, (*shape, 3)),
    )
    return Gaussians(*(jnp.asarray(x, jnp.float32) for x in arrays))


def orbit(*azimuths):
    cameras = geometry.orbit_cameras(list(azimuths), width=WIDTH, height=HEIGHT)
    return Cameras(*(jnp.asarray(x) for x in cameras))


def render(g, capacity=4096, **options):
    """By the twin, whatever the device."""
    return api._rasterize(
        g, orbit(0.0, 100.0), None, jnp.zeros(3), capacity=capacity, **(OPTIONS | options)
    )


def loss_of(renders, alphas):
    return jnp.sum(renders**2) + jnp.sum(jnp.sin(alphas))


def loss_and_result(g, **options):
    result = render(g, **options)
    return loss_of(result.renders, result.alphas), result


# Two capacities' pictures are compared bit for bit, which conftest's emitters of loops do not give.
gradient_and_result = jax.jit(
    jax.grad(loss_and_result, has_aux=True),
    static_argnames=("capacity",),
    compiler_options={"xla_backend_optimization_level": 0} | USERS_EMITTERS,
)


xla_gradient_and_result = quick_jit(
    functools.partial(
        jax.grad(loss_and_result, has_aux=True), implementation="xla", interpret=False
    )
)


def assert_close(got, wanted):
    """Relative L2; two programs of the same kernels round alike, but for a compiler's choices."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(b)


def test_overflow_is_flagged():
    g = random_gaussians(0, NUM)
    gradients, short = gradient_and_result(g, capacity=64)
    count = int(short.num_intersections)
    assert count > 64 and short.overflow
    assert np.isfinite(short.renders).all() and all(np.isfinite(x).all() for x in gradients)
    gradients, exact = gradient_and_result(g, capacity=count)
    assert int(exact.num_intersections) == count and not exact.overflow
    wanted_gradients, wanted = gradient_and_result(g)
    np.testing.assert_array_equal(exact.renders, wanted.renders)
    assert_close(gradients, wanted_gradients)


def test_equal_depths_go_to_the_lower_index():
    """Also where the lower index comes later in memory of equal keys: all 53 at one place."""
    g = random_gaussians(8, NUM)
    g = g._replace(means=jnp.zeros_like(g.means), opacities=jnp.full_like(g.opacities, 0.9))
    wanted = xla_gradient_and_result(g)
    got = gradient_and_result(g)
    np.testing.assert_allclose(got[1].renders, wanted[1].renders, atol=1e-5)
    np.testing.assert_allclose(got[0].colors, wanted[0].colors, atol=1e-4)
    assert np.abs(got[0].colors[0]).max() > 10 * np.abs(got[0].colors[-1]).max()


def test_bad_gaussians_change_nothing():
    g = random_gaussians(9, NUM)
    good = g._replace(opacities=g.opacities.at[:5].set(0))
    means, quats, scales, opacities, colors = g
    bad = Gaussians(
        means.at[0, 1].set(jnp.nan),
        quats.at[1, 0].set(jnp.inf),
        scales.at[2, 2].set(jnp.nan).at[3, 0].set(1e30),
        opacities.at[4].set(-jnp.inf),
        colors,
    )
    (got, result), (wanted, clean) = gradient_and_result(bad), gradient_and_result(good)
    np.testing.assert_array_equal(result.renders, clean.renders)
    assert int(result.num_intersections) == int(clean.num_intersections)
    for a, b in zip(got, wanted, strict=True):
        assert float(jnp.abs(a[:5]).max()) == 0
        np.testing.assert_array_equal(a[5:], b[5:])


def test_empty_scene():
    result = render(random_gaussians(10, 0), capacity=64)
    assert float(result.renders.max()) == 0 and float(result.alphas.max()) == 0
    assert int(result.num_intersections) == 0 and not result.overflow


def test_sixteen_features():
    """The widest rows, where a warp reduces one Gaussian at a time."""
    g = random_gaussians(11, NUM)
    features = jnp.asarray(np.random.default_rng(12).standard_normal((NUM, 16)), jnp.float32)

    def loss(g, features, implementation, interpret):
        options = dict(implementation=implementation, interpret=interpret, with_depths=True)
        result = api._rasterize(
            g, orbit(0.0), features, jnp.ones(3), capacity=4096, **(OPTIONS | options)
        )
        images = result.renders, result.depths, result.features
        return sum(jnp.sum(jnp.sin(x)) for x in images), images

    gradient = quick_jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=(2, 3))
    got, images = gradient(g, features, "pallas_gpu", True)
    wanted, wanted_images = gradient(g, features, "xla", False)
    for a, b in zip(images, wanted_images, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


def test_passes_add_up_to_one(monkeypatch):
    g = random_gaussians(1, NUM)
    wanted, result = gradient_and_result(g)
    count = int(result.num_intersections)
    monkeypatch.setattr(spec, "SUMS_BYTES", 1024)
    sizes = spec.Spec(2, NUM, 1, 0, False, WIDTH, HEIGHT, count, True)
    assert sizes.passes == spec.MOST_PASSES and count > 3 * sizes.window
    run = quick_jit(lambda g: jax.grad(loss_and_result, has_aux=True)(g, capacity=count)[0])
    jax.clear_caches()
    assert_close(run(g), wanted)
    jax.clear_caches()


def test_vmap_of_values_and_gradients():
    g = random_gaussians(2, 3, NUM)
    gradients, results = quick_jit(jax.vmap(jax.grad(loss_and_result, has_aux=True)))(g)
    for i in range(3):
        wanted, result = gradient_and_result(jax.tree.map(lambda x, i=i: x[i], g))
        np.testing.assert_allclose(results.renders[i], result.renders, atol=1e-6)
        assert int(results.num_intersections[i]) == int(result.num_intersections)
        assert_close(jax.tree.map(lambda x, i=i: x[i], gradients), wanted)


def sharded_loss(mesh, interpret):
    def images(g):
        result = render(g, interpret=interpret)
        return result.renders, result.alphas

    def loss(g):
        sharded = jax.shard_map(
            images, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=interpret
        )
        renders, alphas = sharded(g)
        return loss_of(renders, alphas), renders

    return quick_jit(jax.grad(loss, has_aux=True))


def two_devices():
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
def test_shard_map_over_the_batch():
    """The twin on two devices, and the kernels lower for two GPUs."""
    g = random_gaussians(3, 2, NUM)
    mesh = two_devices()
    with jax.set_mesh(mesh):
        split = jax.device_put(g, jax.sharding.NamedSharding(mesh, P("data")))
        gradients, renders = jax.device_get(sharded_loss(mesh, True)(split))
        lowered = sharded_loss(mesh, False).trace(split).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    for i in range(2):
        wanted, result = gradient_and_result(jax.tree.map(lambda x, i=i: x[i], g))
        np.testing.assert_allclose(renders[i], result.renders, atol=1e-6)
        assert_close(jax.tree.map(lambda x, i=i: x[i], gradients), wanted)


@pytest.mark.parametrize("num_features, with_depths", [(0, False), (16, True)])
def test_kernels_lower_for_cuda(num_features, with_depths):
    """Forward and backward, without a GPU; every kernel is in the program."""

    def loss(g, cameras, features, background):
        result = api._rasterize(
            g,
            cameras,
            features if num_features else None,
            background,
            capacity=4096,
            **(OPTIONS | dict(interpret=False, with_depths=with_depths)),
        )
        leaves = [x for x in result[:4] if x is not None]
        return sum(jnp.sum(x**2) for x in leaves)

    arguments = (
        random_gaussians(4, 2, NUM), orbit(0.0), jnp.zeros((2, NUM, 16)), jnp.zeros(3)
    )  # fmt: skip
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    text = gradient.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 5


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_the_error_says_what_is_needed():
    with pytest.raises(NotImplementedError, match="compute capability 9.0.*'xla' and 'reference'"):
        rasterize(
            random_gaussians(5, 7), orbit(0.0), width=8, height=8, implementation="pallas_gpu"
        )


# ---------------------------------------------------------------- on a GPU


def every_operation(ops, block, numbers, out):
    """Uses each lane operation; what it writes must not depend on who runs it."""
    lane = ops.lanes()
    index = block * lanes.LANES + lane
    number = ops.gather(numbers, index)
    votes = ops.ballot(number > 0)
    largest = ops.warp_max(number)
    either = ops.warp_or(number & 5)
    total = ops.full(0, jnp.int32)
    bound = ops.uniform(ops.warp_max(lane & 7))
    _, total = lax.while_loop(
        lambda x: x[0] < bound, lambda x: (x[0] + 1, x[1] + x[0]), (jnp.int32(0), total)
    )
    # The same in every warp: the twin's answer is the block's.
    some = ops.some((lane & 31) == 3) + 2 * ops.some(lane < 0) + ops.full(0, jnp.int32)
    quad = ops.gather(numbers, (index & 31) * 4, 4)
    ops.warp_barrier()
    ops.block_barrier()
    results = [number, votes, ops.count_bits(votes), largest, either, total, some, *quad]
    for i, value in enumerate(results):
        ops.scatter(out, i * 256 + index, value, (index & 3) != 3)
        ops.scatter(out, i * 256 + index, -value, (index & 3) == 3)


@pytest.mark.gpu
def test_lane_operations_mean_the_same():
    numbers = jnp.asarray(np.random.default_rng(6).integers(-99, 99, 256), jnp.int32)
    outputs = [jax.ShapeDtypeStruct((11 * 256,), jnp.int32)]
    run = functools.partial(lanes.launch, every_operation, [numbers], outputs=outputs, grid=2)
    np.testing.assert_array_equal(jax.jit(run)()[0], run(interpret=True)[0])


@pytest.mark.gpu
def test_two_runs_on_a_gpu_give_the_same_bits():
    """With the implementation picked by default, whose sorts are CUB's."""
    g = random_gaussians(7, 3, 20_000)
    g = g._replace(scales=g.scales * 0.2)

    def loss(g):
        result = rasterize(g, orbit(0.0, 90.0), width=256, height=256, capacity=1_000_000)
        return jnp.sum(result.renders**2) + jnp.sum(result.depths), result

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    text = gradient.lower(g).compile().as_text()
    assert "mosaic_gpu" in text and text.count("cub") >= 2
    first, second = gradient(g), gradient(g)
    assert not first[1].overflow and int(first[1].num_intersections) > 100_000
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
