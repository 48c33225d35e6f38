"""What `rasterize` promises: conventions, shapes, capacity, bad values, transformations."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compiling import USERS_EMITTERS
from jax.sharding import PartitionSpec as P

from fourdstar_jax import geometry
from fourdstar_jax.kernels.rasterize import (
    api,
    binning,
    pick_capacity,
    rasterize,
    rows,
    usable_mask,
)
from fourdstar_jax.kernels.rasterize.implementation import Implementation
from fourdstar_jax.types import Cameras, Gaussians

SIZE = dict(width=31, height=23)
RED, GREEN, BLUE = np.eye(3, dtype=np.float32)
# Compiling takes most of this file's time; the values test compiles as users do.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_gaussians(seed, *shape, scale=0.06):
    rng = np.random.default_rng(seed)
    return Gaussians(
        means=jnp.asarray(rng.uniform(-0.5, 0.5, (*shape, 3)), jnp.float32),
        quats=jnp.asarray(rng.standard_normal((*shape, 4)), jnp.float32),
        scales=jnp.asarray(scale * np.exp(rng.uniform(-1, 1, (*shape, 3))), jnp.float32),
        opacities=jnp.asarray(rng.uniform(0.1, 0.9, shape), jnp.float32),
        colors=jnp.asarray(rng.uniform(0, 1, (*shape, 3)), jnp.float32),
    )


def balls(means, colors, scale=0.03):
    num = len(means)
    return Gaussians(
        means=np.float32(means),
        quats=np.tile(np.float32([1, 0, 0, 0]), (num, 1)),
        scales=np.full((num, 3), scale, np.float32),
        opacities=np.full(num, 0.9, np.float32),
        colors=np.float32(colors),
    )


def orbit(*azimuths, **size):
    return geometry.orbit_cameras(list(azimuths), **(size or SIZE))


def where_is(image, color):
    """(x, y) of the pixel that has most of a colour and least of the others."""
    score = image @ (2 * color - 1)
    y, x = np.unravel_index(np.argmax(score), score.shape)
    return x + 0.5, y + 0.5


def test_camera_convention():
    """World y is up in the picture, x to the right; from azimuth 90 the camera stands on +x."""
    g = balls([[0.4, 0, 0], [0, 0.4, 0], [0, 0, 0.4]], [RED, GREEN, BLUE])
    size = dict(width=64, height=48)
    viewmats, Ks = orbit(0, 90, 0, **size)
    viewmats[2, 0, 3] -= 0.2  # this camera stands 0.2 to the right of the first one
    result = rasterize(g, Cameras(viewmats, Ks), **size)
    front, side, moved = np.asarray(result.renders)
    f = 24 / np.tan(np.deg2rad(49.1 / 2))
    shift = f * 0.4 / 1.5
    np.testing.assert_allclose(where_is(front, RED), (32 + shift, 24), atol=1)
    np.testing.assert_allclose(where_is(front, GREEN), (32, 24 - shift), atol=1)
    np.testing.assert_allclose(where_is(front, BLUE), (32, 24), atol=1)
    np.testing.assert_allclose(where_is(side, RED), (32, 24), atol=1)
    np.testing.assert_allclose(where_is(side, GREEN), (32, 24 - shift), atol=1)
    np.testing.assert_allclose(where_is(side, BLUE), (32 - shift, 24), atol=1)
    np.testing.assert_allclose(where_is(moved, RED), (32 + f * 0.2 / 1.5, 24), atol=1)
    np.testing.assert_allclose(where_is(moved, BLUE), (32 - f * 0.2 / 1.1, 24), atol=1)
    depths = np.asarray(result.depths)[0, ..., 0]
    np.testing.assert_allclose(depths[24, int(32 + shift)], 1.5, atol=1e-3)
    np.testing.assert_allclose(depths[24, 32], 1.1, atol=1e-3)


def test_leading_axes_broadcast():
    g = random_gaussians(0, 2, 3, 17)
    views = [orbit(10.0 * b, 100.0 + b, 200.0 - b) for b in range(2)]
    cameras = Cameras(*(jnp.stack(x)[:, None] for x in zip(*views, strict=True)))  # [2, 1, 3]
    features = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 17, 2)), jnp.float32)
    background = jnp.asarray(np.random.default_rng(2).random((2, 1, 3, 3)), jnp.float32)
    # One and many round alike by users' emitters of loops.
    run = jax.jit(functools.partial(rasterize, **SIZE), compiler_options=USERS_EMITTERS)
    whole = run(g, cameras, features=features, background=background)
    assert whole.renders.shape == (2, 3, 3, 23, 31, 3)
    assert whole.alphas.shape == whole.depths.shape == (2, 3, 3, 23, 31, 1)
    assert whole.features.shape == (2, 3, 3, 23, 31, 2)
    count = 0
    for b in range(2):
        for t in range(3):
            one = run(
                jax.tree.map(lambda x, b=b, t=t: x[b, t], g),
                Cameras(cameras.viewmats[b, 0], cameras.Ks[b, 0]),
                features=features[b, t],
                background=background[b, 0],
            )
            for field in ("renders", "alphas", "depths", "features"):
                np.testing.assert_allclose(
                    getattr(whole, field)[b, t], getattr(one, field), atol=1e-6
                )
            count += int(one.num_intersections)
    assert count == int(whole.num_intersections) and not whole.overflow


def test_shared_gaussians_and_batched_cameras():
    g = random_gaussians(3, 17)
    cameras = Cameras(*(np.stack([x, x[::-1]]) for x in orbit(0.0, 70.0)))
    result = rasterize(g, cameras, **SIZE)
    np.testing.assert_array_equal(result.renders[0, 0], result.renders[1, 1])
    assert np.abs(result.renders[0, 0] - result.renders[0, 1]).max() > 0.1


def test_without_depths():
    g = random_gaussians(4, 5)
    features = jnp.ones((5, 2))
    with_them = rasterize(g, orbit(0.0), features=features, **SIZE)
    without = rasterize(g, orbit(0.0), features=features, with_depths=False, **SIZE)
    assert without.depths is None
    for field in ("renders", "alphas", "features"):
        np.testing.assert_allclose(
            getattr(without, field), getattr(with_them, field), atol=1e-6, err_msg=field
        )


def test_background_is_black_unless_given():
    g = random_gaussians(4, 5)
    black = rasterize(g, orbit(0.0), **SIZE)
    white = rasterize(g, orbit(0.0), background=jnp.ones(3), **SIZE)
    np.testing.assert_allclose(
        white.renders - black.renders,
        np.broadcast_to(1 - black.alphas, white.renders.shape),
        atol=1e-6,
    )
    assert float(black.alphas.min()) == 0 and float(black.renders.min()) == 0


def test_near_and_far():
    g = balls([[0, 0, 0.5], [0, 0, 0], [0, 0, -0.5]], [RED, GREEN, BLUE], scale=0.2)
    result = rasterize(g, orbit(0.0), near=1.2, far=1.8, **SIZE)
    assert float(result.renders[..., 1].max()) > 0.5
    assert float(result.renders[..., [0, 2]].max()) == 0


def test_equal_depths_go_to_the_lower_index():
    g = balls([[0, 0, 0], [0, 0, 0]], [RED, GREEN], scale=0.3)
    red, green, _ = np.asarray(rasterize(g, orbit(0.0), **SIZE).renders)[0, 11, 15]
    assert red > 5 * green > 0


@pytest.mark.parametrize("dense_limit", [0, 2**22])
def test_overflow_is_flagged(monkeypatch, dense_limit):
    monkeypatch.setattr(binning, "DENSE_LIMIT", dense_limit)
    jax.clear_caches()
    g = random_gaussians(5, 97)
    short = rasterize(g, orbit(0.0), **SIZE, capacity=97)
    count = int(short.num_intersections)
    assert count > 97 and short.overflow and np.isfinite(short.renders).all()
    exact = rasterize(g, orbit(0.0), **SIZE, capacity=count)
    assert int(exact.num_intersections) == count and not exact.overflow
    dense = rasterize(g, orbit(0.0), **SIZE, implementation="reference")
    np.testing.assert_allclose(exact.renders, dense.renders, atol=1e-5)
    jax.clear_caches()


def test_traced_call_without_capacity_flags_overflow(monkeypatch):
    monkeypatch.setattr(binning, "DENSE_LIMIT", 0)
    monkeypatch.setattr(binning, "TRACED_PAIRS_LEAST", 0)
    monkeypatch.setattr(binning, "TRACED_PAIRS_PER_GAUSSIAN", 2)
    jax.clear_caches()
    g = random_gaussians(6, 97)
    traced = jax.jit(lambda g: rasterize(g, orbit(0.0), **SIZE))(g)
    assert traced.overflow and int(traced.num_intersections) > 2 * 97
    eager = rasterize(g, orbit(0.0), **SIZE)  # renders again with room for all
    assert not eager.overflow and eager.num_intersections == traced.num_intersections
    jax.clear_caches()


def test_pick_capacity():
    assert pick_capacity(0) == 1024
    counts = range(0, 200_000, 499)
    sizes = [pick_capacity(n) for n in counts]
    for n, size in zip(counts, sizes, strict=True):
        assert 1.1 * n <= size <= 1.1 * 1.25 * n + 3072
    assert len(set(sizes)) < 30
    assert pick_capacity(50_000, current=60_416) == 60_416
    assert pick_capacity(61_000, current=60_416) > 67_000
    assert pick_capacity(1_000, current=60_416) < 3_000


def test_empty_scene():
    result = rasterize(
        random_gaussians(7, 2, 0),
        orbit(0.0),
        features=jnp.zeros((2, 0, 3)),
        background=jnp.asarray([0.2, 0.4, 0.6]),
        **SIZE,
    )
    np.testing.assert_allclose(result.renders, np.broadcast_to([0.2, 0.4, 0.6], (2, 1, 23, 31, 3)))
    assert result.features.shape == (2, 1, 23, 31, 3)
    assert float(result.alphas.max()) == 0 and int(result.num_intersections) == 0


BAD = [
    ("means", np.nan),
    ("quats", np.inf),
    ("scales", np.nan),
    ("opacities", -np.inf),
    ("colors", np.nan),
    ("features", np.nan),
    ("scales", 1e30),  # finite, but its projection is not
    ("means", 3e38),
]


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bad_gaussians_are_dropped_whole(implementation):
    """Gaussian i is bad in way i; the picture is that of the others, and so are the gradients."""
    num = 19
    g = random_gaussians(8, num)
    features = jnp.asarray(np.random.default_rng(9).standard_normal((num, 2)), jnp.float32)
    bad, bad_features = g, features
    for i, (field, value) in enumerate(BAD):
        if field == "features":
            bad_features = bad_features.at[i, 0].set(value)
        else:
            x = getattr(bad, field)
            bad = bad._replace(**{field: x.at[(i, *(0,) * (x.ndim - 1))].set(value)})
    good = (g._replace(opacities=g.opacities.at[: len(BAD)].set(0)), features)

    def loss(arrays):
        g, features = arrays
        result = rasterize(
            g, orbit(0.0, 45.0), features=features, implementation=implementation, **SIZE
        )
        images = jnp.concatenate([result.renders, result.depths, result.features], axis=-1)
        weights = np.random.default_rng(1).standard_normal(images.shape)
        return jnp.sum(images * weights.astype(np.float32)), images

    gradient = quick_jit(jax.grad(loss, has_aux=True))
    got, images = gradient((bad, bad_features))
    wanted, wanted_images = gradient(good)
    np.testing.assert_allclose(images, wanted_images, atol=1e-6)
    assert float(jnp.abs(images).max()) > 0.1
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.abs(a[: len(BAD)]).max()) == 0
        np.testing.assert_allclose(a[len(BAD) :], b[len(BAD) :], rtol=1e-4, atol=1e-4)
    mask = usable_mask(bad, bad_features)
    np.testing.assert_array_equal(mask[: len(BAD)], [False] * 6 + [True] * 2)
    assert mask[len(BAD) :].all()


def loss_and_image(g):
    renders = rasterize(g, orbit(0.0, 120.0), **SIZE).renders
    return jnp.sum(renders**2), renders


gradient_and_image = quick_jit(jax.grad(loss_and_image, has_aux=True))


def test_zero_quaternion_is_the_identity():
    g = random_gaussians(10, 29)
    zero = g._replace(quats=jnp.zeros_like(g.quats))
    one = g._replace(quats=jnp.zeros_like(g.quats).at[:, 0].set(1))
    gradient, image = gradient_and_image(zero)
    np.testing.assert_array_equal(image, gradient_and_image(one)[1])
    assert float(image.max()) > 0.05
    assert all(np.isfinite(x).all() for x in gradient)
    assert float(jnp.abs(gradient.means).max()) > 0


def test_two_runs_give_the_same_bits():
    g = random_gaussians(14, 29)
    first, second = gradient_and_image(g), gradient_and_image(g)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("eps2d, antialiased", [(0.0, False), (0.3, True)])
def test_scales_of_zero_and_below_are_finite(eps2d, antialiased):
    g = random_gaussians(11, 12)
    scales = g.scales * jnp.asarray([0.0, -1.0, 1.0])
    g = g._replace(scales=scales.at[:4].set(0.0).at[4:8].set(-g.scales[4:8]))

    def loss(g):
        result = rasterize(g, orbit(20.0), eps2d=eps2d, antialiased=antialiased, **SIZE)
        return jnp.sum(result.renders**2) + jnp.sum(result.depths), result.renders

    gradient, renders = quick_jit(jax.grad(loss, has_aux=True))(g)
    assert np.isfinite(renders).all() and all(np.isfinite(x).all() for x in gradient)
    assert float(renders.max()) > 0.05


def test_vmap_of_values_and_gradients():
    g = random_gaussians(12, 3, 29)
    gradients, images = quick_jit(jax.vmap(jax.grad(loss_and_image, has_aux=True)))(g)
    for i in range(3):
        gradient, image = gradient_and_image(jax.tree.map(lambda x, i=i: x[i], g))
        np.testing.assert_allclose(images[i], image, atol=1e-6)
        for a, b in zip(gradients, gradient, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def test_shard_map_over_the_batch():
    g = random_gaussians(13, 2, 29)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])

    def images(g):
        return rasterize(g, orbit(0.0, 120.0), **SIZE).renders

    def loss(g):
        sharded = jax.shard_map(images, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
        renders = sharded(g)
        return jnp.sum(renders**2), renders

    with jax.set_mesh(mesh):
        split = jax.device_put(g, jax.sharding.NamedSharding(mesh, P("data")))
        gradients, renders = quick_jit(jax.grad(loss, has_aux=True))(split)
    assert renders.sharding.spec[0] == "data"
    gradients, renders = jax.device_get((gradients, renders))
    for i in range(2):
        gradient, image = gradient_and_image(jax.tree.map(lambda x, i=i: x[i], g))
        np.testing.assert_allclose(renders[i], image, atol=1e-6)
        for a, b in zip(gradients, gradient, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-4)


def test_memory_is_bounded_by_tiles():
    """No array has pixels times Gaussians entries, forward or backward."""
    num, size = 5003, 96

    def loss(g):
        return jnp.sum(rasterize(g, orbit(0.0), width=size, height=size, capacity=20_011).renders)

    compiled = quick_jit(jax.grad(loss)).lower(random_gaussians(15, num)).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0 < temporary < 4 * num * size * size / 4


def bad_call(**changes):
    g = changes.pop("gaussians", random_gaussians(16, 7))
    cameras = changes.pop("cameras", orbit(0.0))
    fields = {k: changes.pop(k) for k in list(changes) if k in Gaussians._fields}
    cams = {k: changes.pop(k) for k in list(changes) if k in Cameras._fields}
    options = {**SIZE, **changes}
    return rasterize(g._replace(**fields), cameras._replace(**cams), **options)


@pytest.mark.parametrize(
    "name, value",
    [
        ("means", jnp.zeros((7, 2))),
        ("means", jnp.zeros((7, 3), jnp.int32)),
        ("quats", jnp.zeros((7, 3))),
        ("scales", jnp.zeros((6, 3))),
        ("opacities", jnp.zeros((7, 1))),
        ("colors", jnp.zeros((7, 4))),
        ("viewmats", jnp.zeros((1, 3, 4))),
        ("Ks", jnp.zeros((2, 3, 3))),
        ("features", jnp.zeros((6, 2))),
        ("features", jnp.zeros((7, 17))),
        ("features", jnp.zeros((7, 2), jnp.int32)),
        ("background", jnp.zeros((5, 3))),
        ("background", jnp.zeros(4)),
        ("width", 0),
        ("height", -3),
        ("capacity", 0),
        ("near", 0.0),
        ("far", 0.001),
        ("eps2d", -1.0),
        ("implementation", "cuda"),
    ],
)
def test_wrong_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        bad_call(**{name: value})


def test_leading_axes_that_do_not_broadcast_are_named():
    g = random_gaussians(17, 2, 7)
    cameras = Cameras(*(np.stack([x] * 3) for x in orbit(0.0)))
    with pytest.raises(ValueError, match="leading axes"):
        rasterize(g, cameras, **SIZE)


@pytest.mark.parametrize("implementation", ["pallas_gpu", "pallas_tpu"])
def test_kernels_that_cannot_run_say_which_can(implementation):
    with pytest.raises(NotImplementedError, match="'xla' and 'reference'"):
        bad_call(implementation=implementation)


def test_one_line_adds_an_implementation(monkeypatch):
    """All that the call knows of an implementation stands in the table."""
    seen = []

    def blend(projected, channels, *, width, height, capacity):
        seen.append((width, height, capacity))
        images = jnp.ones((channels.shape[0], height, width, channels.shape[2] + 1))
        return images, rows.Counts(jnp.int32(5), jnp.bool_(False))

    flat = Implementation(16, rows.from_rows(blend))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "flat", flat)
    result = bad_call(implementation="flat", background=jnp.ones(3))
    np.testing.assert_array_equal(result.renders, jnp.full((1, 23, 31, 3), 2.0))
    assert int(result.num_intersections) == 5 and not result.overflow
    assert seen == [(31, 23, 2 * 2 * 7)]  # room for seven Gaussians on each tile of 16 pixels
    result = bad_call(implementation="flat", capacity=3)
    assert seen[1] == (31, 23, 3)


def test_the_default_is_the_first_that_runs(monkeypatch):
    arrays = random_gaussians(18, 7)
    backend = jax.default_backend()
    plain = api.IMPLEMENTATIONS["xla"]
    table = {
        "xla": plain,
        "broken": plain._replace(default_on=backend, why_not=lambda: "is broken"),
        "elsewhere": plain._replace(default_on="elsewhere"),
        "good": plain._replace(default_on=backend, float32_only=True),
    }
    monkeypatch.setattr(api, "IMPLEMENTATIONS", table)
    with pytest.warns(UserWarning, match="'broken' is broken"):
        assert api.default_implementation(arrays) == "good"
    del table["broken"]
    assert api.default_implementation(arrays) == "good"
    half = jax.tree.map(lambda x: x.astype(jnp.float16), arrays)
    assert api.default_implementation(half) == "xla"
    with pytest.raises(ValueError, match="must be one of"):
        bad_call(implementation="broken")
    table["good"] = table["good"]._replace(why_not=lambda: "needs a miracle")
    with pytest.raises(NotImplementedError, match="'good' needs a miracle; 'elsewhere' and 'xla'"):
        bad_call(implementation="good")


def test_implementations_are_siblings():
    """None imports another, so each can be read, or go, alone."""
    folder = Path(api.__file__).parent
    for name in api.IMPLEMENTATIONS:
        files = [folder / f"{name}.py", *(folder / name).glob("*.py")]
        text = "".join(file.read_text() for file in files if file.exists())
        assert "jnp" in text
        for other in set(api.IMPLEMENTATIONS) - {name}:
            assert f"rasterize.{other}" not in text and f"rasterize import {other}" not in text
