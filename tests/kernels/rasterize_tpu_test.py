"""The Pallas TPU rasterizer against the definition, on the CPU; its compilation for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from fourdstar_jax import sharding
from fourdstar_jax.kernels.rasterize import binning, pallas_tpu, reference, tiles
from fourdstar_jax.kernels.rasterize.projection import Projected

SIZE = dict(width=37, height=53)  # two by two tiles, cut off at the edges
NUM, CHANNELS = 199, 3
ATOL = 1e-5
GRADIENT_RTOL = 1e-4  # relative L2, for each argument
# Compiling takes most of the time here.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make_scene(
    seed, *shape, num=NUM, channels=CHANNELS, scale=5.0, opacity=(0.05, 0.9), width, height
):
    """Projected Gaussians [*shape, num] all over the image and a little beyond."""
    rng = np.random.default_rng(seed)
    shape = (*shape, num)
    means = rng.uniform(-5, [width + 5, height + 5], (*shape, 2))
    across, along = scale * np.exp(rng.uniform(-1, 1, (2, *shape)))
    turn = rng.uniform(0, np.pi, shape)
    xx = (across * np.cos(turn)) ** 2 + (along * np.sin(turn)) ** 2
    yy = (across * np.sin(turn)) ** 2 + (along * np.cos(turn)) ** 2
    xy = (across**2 - along**2) * np.sin(turn) * np.cos(turn)
    a = np.sqrt(yy) / (across * along)
    opacities = rng.uniform(*opacity, shape)
    reach = 2 * np.log(255 * opacities) + 1e-2
    projected = Projected(
        means2d=means,
        conic_roots=np.stack([a, -a * xy / yy, 1 / np.sqrt(yy)], axis=-1),
        opacities=opacities,
        depths=rng.uniform(1, 2, shape),
        radii=np.sqrt(reach[..., None] * np.stack([xx, yy], axis=-1)) + 0.01,
    )
    values = rng.standard_normal((*shape, channels))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (projected, values))


def clean_pixels(projected, width, height):
    """Which pixels [I, h, w, 1] are near no cut-off, where a last digit would decide."""
    px, py = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    clean = np.ones((projected.depths.shape[0], height, width, 1))
    for image, p in zip(clean, zip(*map(np.float64, projected), strict=True), strict=True):
        means2d, roots, opacities, depths, radii = p
        left = np.ones((height, width))
        for i in np.argsort(np.float32(np.where(radii[:, 0] > 0, depths, np.inf)), kind="stable"):
            dx, dy = means2d[i, 0] - px, means2d[i, 1] - py
            a, b, c = roots[i]
            raw = opacities[i] * np.exp(-((a * dx + b * dy) ** 2 + (c * dy) ** 2) / 2)
            left *= 1 - np.where(raw < 1 / 255, 0, np.minimum(raw, 0.999))
            near = (np.abs(raw * 255 - 1) < 1e-5) | (np.abs(raw / 0.999 - 1) < 1e-5)
            image[near | (np.abs(left / 1e-4 - 1) < 1e-4)] = 0
    assert clean.mean() > 0.98
    return clean.astype(np.float32)


def weights(*shape):
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape), jnp.float32)


@functools.partial(quick_jit, static_argnames=("width", "height", "capacity", "interpret"))
def evaluate(projected, channels, cotangent, interpret=None, capacity=4000, **size):
    """Images and gradients: of the definition, or of the kernels where `interpret` is given."""

    def images(projected, channels):
        if interpret is None:
            return reference.blend(projected, channels, **size)
        options = dict(capacity=capacity, interpret=interpret, **size)
        return pallas_tpu.blend(projected, channels, **options)[0]

    out, vjp = jax.vjp(images, projected, channels)
    return out, vjp(cotangent)


def check_gradients(got, wanted):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted), strict=True
    ):
        label = jax.tree_util.keystr(path)
        assert np.isfinite(x).all(), label
        assert np.linalg.norm(x - y) <= GRADIENT_RTOL * np.linalg.norm(y), label


def check(projected, channels, interpret=True, width=SIZE["width"], height=SIZE["height"]):
    """Values and gradients of the kernels against the definition; returns both."""
    size = dict(width=width, height=height)
    clean = clean_pixels(projected, **size)
    cotangent = clean * weights(*clean.shape[:-1], channels.shape[-1] + 1)
    out, gradients = evaluate(projected, channels, cotangent, interpret, **size)
    wanted, wanted_gradients = evaluate(projected, channels, cotangent, **size)
    assert out.shape == wanted.shape and np.isfinite(out).all()
    np.testing.assert_allclose(out * clean, wanted * clean, atol=ATOL, rtol=0)
    check_gradients(gradients, wanted_gradients)
    return out, gradients


def list_lengths(projected):
    bins = binning.bin_gaussians(projected, tiles.Grid(pallas_tpu.TILE, **SIZE), 4000)
    assert not bins.overflow
    return np.diff(bins.offsets)


def test_many_tiles():
    projected, channels = make_scene(0, 2, **SIZE)
    lengths = list_lengths(projected)  # chunks hold 128
    assert lengths.size == 8 and lengths.min() < 128 < lengths.max()
    _, gradients = check(projected, channels)
    dprojected, dchannels = gradients
    for x in (*dprojected[:3], dchannels):
        assert np.abs(x).max() > 0


def test_empty_scene_and_culled_gaussians():
    projected, channels = make_scene(1, 2, **SIZE)
    keep = np.stack([np.zeros(NUM, bool), np.arange(NUM) % 50 == 0])
    projected = projected._replace(
        radii=projected.radii * keep[..., None], opacities=projected.opacities * keep
    )
    assert list_lengths(projected)[:4].max() == 0 < list_lengths(projected)[4:].max()
    out, gradients = check(projected, channels)
    assert not out[0, ..., :-1].any() and (out[0, ..., -1] == 1).all()
    for x in jax.tree.leaves(gradients):
        assert not x[0].any()


def test_stops_when_all_pixels_are_used_up():
    """What lies behind 128 opaque Gaussians is never looked at, so it may be anything."""
    projected, channels = make_scene(2, 2, scale=300.0, opacity=(0.9, 0.99), **SIZE)
    front = np.arange(NUM) < 128
    projected = projected._replace(depths=jnp.where(front, 1.0, 2.0) + 0 * projected.depths)
    assert list_lengths(projected).min() == NUM
    channels = channels * front[:, None]
    out, gradients = check(projected, channels)
    assert out[..., -1].max() < 0.01
    hidden = jnp.where(front[:, None], channels, jnp.nan)
    again, hidden_gradients = evaluate(projected, hidden, weights(*out.shape), True, **SIZE)
    np.testing.assert_array_equal(again, out)
    for x in jax.tree.leaves(hidden_gradients):
        assert np.isfinite(x).all() and not x[:, ~front].any()


def test_opacity_one_is_clamped():
    projected, channels = make_scene(3, 2, scale=2.0, **SIZE)
    full = np.arange(NUM) % 3 == 0
    means2d = np.floor(projected.means2d) + 0.5  # so that pixels see all of an opacity
    projected = projected._replace(
        means2d=jnp.where(full[:, None], means2d, projected.means2d),
        opacities=jnp.where(full, 1.0, projected.opacities),
        radii=projected.radii * 2,
    )
    out, _ = check(projected, channels)
    assert out[..., -1].min() < 2e-3


def test_sixteen_features():
    size = dict(width=31, height=7)
    out, gradients = check(*make_scene(4, 1, num=11, channels=3 + 1 + 1 + 16, **size), **size)
    assert out.shape == (1, 7, 31, 22)
    assert np.abs(gradients[1]).max(axis=(0, 1)).min() > 0  # of every channel


def test_modelled_memory(capfd):
    """With copies and semaphores modelled: no race, and every copy is waited for."""
    size = dict(width=29, height=23)
    projected, channels = make_scene(5, 2, num=137, channels=1, opacity=(0.02, 0.1), **size)
    # The first image ends in its first chunk, with the next one on its way.
    opacities = projected.opacities.at[0].set(0.7)
    roots = projected.conic_roots.at[0].multiply(1e-3)
    radii = jnp.full_like(projected.radii, 100.0)
    projected = projected._replace(opacities=opacities, conic_roots=roots, radii=radii)
    model = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    out, gradients = check(projected, channels, interpret=model, **size)
    assert out[0, ..., -1].max() < 0.01 and out[1, ..., -1].min() > 1e-3
    last = jnp.argmax(projected.depths[1])
    assert gradients[1][1, last] != 0  # the second image needs its second chunk
    assert not interpret_pallas_call.races.races_found
    assert "Semaphore" not in capfd.readouterr().out  # of a count that is left at the end


def test_capacity():
    projected, channels = make_scene(6, 2, num=97, channels=1, **SIZE)

    @functools.partial(quick_jit, static_argnames="capacity")
    def run(capacity):
        return pallas_tpu.blend(projected, channels, capacity=capacity, interpret=True, **SIZE)

    wanted = reference.blend(projected, channels, **SIZE)
    clean = clean_pixels(projected, **SIZE)
    count = int(list_lengths(projected).sum())
    out, counts = run(count)
    np.testing.assert_allclose(out * clean, wanted * clean, atol=ATOL, rtol=0)
    assert int(counts.num_pairs) == count and not counts.overflow
    out, counts = run(count - 1)
    assert int(counts.num_pairs) == count and counts.overflow and np.isfinite(out).all()


def test_vmap():
    """Over Gaussians that differ, twice, and channels that do not; on both sides of a gradient."""
    size = dict(width=34, height=9)
    projected, channels = make_scene(7, 3, 2, 1, num=23, channels=1, **size)
    channels = channels[0, 0]
    flat = jax.tree.map(lambda x: x.reshape(6, *x.shape[3:]), projected)
    clean = clean_pixels(flat, **size).reshape(3, 2, 1, 9, 34, 1)
    cotangent = clean * weights(3, 2, 1, 9, 34, 2)

    def mapped(blend):
        def loss(projected, channels, cotangent):
            out = blend(projected, channels)
            return jnp.sum(out * cotangent), out

        def twice(f):
            return jax.vmap(jax.vmap(f, (0, None, 0)), (0, None, 0))

        def total(*arguments):
            return jnp.sum(twice(loss)(*arguments)[0])

        inside = quick_jit(twice(jax.grad(loss, (0, 1), has_aux=True)))
        outside = quick_jit(jax.grad(total, (0, 1)))
        gradients, out = inside(projected, channels, cotangent)
        return out, gradients, outside(projected, channels, cotangent)

    def kernels(projected, channels):
        return pallas_tpu.blend(projected, channels, capacity=50, interpret=True, **size)[0]

    out, inside, outside = mapped(kernels)
    wanted, wanted_inside, wanted_outside = mapped(functools.partial(reference.blend, **size))
    np.testing.assert_allclose(out * clean, wanted * clean, atol=ATOL, rtol=0)
    check_gradients(inside, wanted_inside)
    check_gradients(outside, wanted_outside)


def test_shard_map():
    size = dict(width=34, height=9)
    projected, channels = make_scene(8, 2, num=23, channels=1, **size)
    clean = clean_pixels(projected, **size)
    cotangent = clean * weights(2, 9, 34, 2)
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,), devices=devices)

    def sharded(interpret):
        def local(projected, channels, cotangent):
            def images(projected, channels):
                options = dict(capacity=50, interpret=interpret, **size)
                return pallas_tpu.blend(projected, channels, **options)[0]

            out, vjp = jax.vjp(images, projected, channels)
            return out, vjp(cotangent)

        return quick_jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))

    with jax.set_mesh(mesh):
        arguments = jax.device_put(
            (projected, channels, cotangent), jax.sharding.NamedSharding(mesh, P("data"))
        )
        out, gradients = jax.device_get(sharded(pltpu.InterpretParams())(*arguments))
        lowered = sharded(False).trace(*arguments).lower(lowering_platforms=("tpu",))
    assert lowered.as_text().count("@tpu_custom_call") == 2
    wanted, wanted_gradients = evaluate(projected, channels, cotangent, **size)
    np.testing.assert_allclose(out * clean, wanted * clean, atol=ATOL, rtol=0)
    check_gradients(gradients, wanted_gradients)


def for_tpu(batch, channels, gradient):
    """A function of a whole scene, and the shapes of its arguments."""
    size = dict(width=100, height=70)

    def images(projected, channels):
        return pallas_tpu.blend(projected, channels, capacity=20_000, **size)[0]

    for _ in batch:
        images = jax.vmap(images)

    def loss(projected, channels):
        return jnp.sum(images(projected, channels) ** 2)

    scene = make_scene(0, *batch, 2, num=500, channels=channels, **size)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), scene)
    return jax.jit(jax.grad(loss, (0, 1)) if gradient else images), shapes


@pytest.mark.parametrize(
    "batch, channels, x64", [((), 1, False), ((), 21, False), ((3,), 5, False), ((), 5, True)]
)
def test_lowers_for_tpus(batch, channels, x64):
    for gradient, kernels in ((False, 1), (True, 2)):
        function, shapes = for_tpu(batch, channels, gradient)
        with jax.enable_x64(x64):
            text = function.trace(*shapes).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("@tpu_custom_call") == kernels


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_compiles_for_tpus(monkeypatch, topology):
    """All of the compiler but the device; needs libtpu, no TPU."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    function, shapes = for_tpu((), 5, gradient=True)
    with sharding.use_mesh(devices=devices[:1]) as mesh:
        whole = jax.sharding.NamedSharding(mesh, P())
        shapes = jax.tree.map(lambda x: x.update(sharding=whole), shapes)
        compiled = function.lower(*shapes).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.tpu
def test_on_a_tpu():
    out, _ = check(*make_scene(0, 2, **SIZE), interpret=False)
    assert out[..., -1].min() < 0.9  # the scene shows something
