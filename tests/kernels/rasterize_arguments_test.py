"""What `rasterize` takes and refuses, strict promotion, and gradients at the ends of the range."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.kernels.rasterize import api, binning, rasterize
from fourdstar_jax.types import Cameras, Gaussians

SIZE = dict(width=16, height=16)
VIEWMATS = np.eye(4, dtype=np.float32)[None]
VIEWMATS[0, 2, 3] = 2
KS = np.float32([[[15, 0, 8], [0, 15, 8], [0, 0, 1]]])
CAMERAS = Cameras(VIEWMATS, KS)


@pytest.fixture(autouse=True)
def mesh():
    """None; and what one test has compiled serves the next."""


def scene(num=5, seed=0):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(num, 3)) * 0.2, rng.normal(size=(num, 4)), np.full((num, 3), 0.1)]
    arrays += [np.full(num, 0.7), rng.uniform(size=(num, 3))]
    return Gaussians(*(x.astype(np.float32) for x in arrays))


def test_lists_and_numbers_are_arrays():
    g = scene()
    want = rasterize(g, CAMERAS, background=np.full(3, 0.5, np.float32), **SIZE)
    lists = Gaussians(*(x.tolist() for x in g))
    cameras = Cameras(VIEWMATS.astype(int).tolist(), KS.astype(int).tolist())
    got = rasterize(lists, cameras, background=0.5, width=np.int64(16), height=jnp.int32(16))
    np.testing.assert_array_equal(got.renders, want.renders)
    mixed = rasterize(g._replace(means=list(jnp.asarray(g.means))), CAMERAS, **SIZE)
    np.testing.assert_allclose(mixed.alphas, want.alphas)


def intrinsics(row, column, value):
    Ks = KS.copy()
    Ks[0, row, column] = value
    return Ks


@pytest.mark.parametrize(
    "field, value",
    [
        ("Ks", intrinsics(2, 2, 2.0)),
        ("Ks", intrinsics(0, 1, 0.5)),  # skew
        ("Ks", intrinsics(2, 0, 8.0)),
        ("Ks", jnp.asarray(intrinsics(0, 2, np.nan))),
        ("Ks", intrinsics(1, 1, np.inf)),
        ("Ks", intrinsics(0, 0, 0.0)),
        ("Ks", intrinsics(1, 1, -15.0)),
        ("Ks", KS.tolist()[0]),
        ("Ks", KS.astype(int)),
        ("viewmats", VIEWMATS.transpose(0, 2, 1)),
        ("viewmats", VIEWMATS * np.nan),
        ("viewmats", VIEWMATS > 0),
    ],
)
def test_wrong_cameras_are_named(field, value):
    with pytest.raises(ValueError, match=f"cameras.{field} must"):
        rasterize(scene(), CAMERAS._replace(**{field: value}), **SIZE)


@pytest.mark.parametrize(
    "name, value",
    [
        ("means", [[0.0, 0, 0], [1.0]]),
        ("means", None),
        ("means", "everywhere"),
        ("opacities", 0.5),
        ("opacities", [True] * 5),
        ("colors", np.ones((5, 3), complex)),
        ("quats", {}),
        ("features", 1.0),
        ("features", [[1.0]] * 4),
        ("background", [0.0, 1.0]),
        ("background", "white"),
        ("background", [0.0, np.nan, 1.0]),
        ("width", 16.0),
        ("height", True),
        ("capacity", 2**31 - 1),
        ("capacity", "many"),
        ("near", None),
        ("far", np.nan),
        ("eps2d", "small"),
        ("antialiased", "yes"),
        ("with_depths", None),
        ("implementation", ["xla"]),
    ],
)
def test_wrong_arguments_are_named(name, value):
    g, options = scene(), dict(SIZE)
    if name in Gaussians._fields:
        g = g._replace(**{name: value})
    else:
        options[name] = value
    with pytest.raises(ValueError, match=name):
        rasterize(g, CAMERAS, **options)


def test_traced_numbers_are_named():
    for name in ("near", "width"):
        with pytest.raises(ValueError, match=f"^{name}=.*known when compiling"):
            jax.jit(lambda x, name=name: rasterize(scene(), CAMERAS, **SIZE | {name: x}))(1)


def test_sizes_beyond_int32_are_refused_and_counts_overflow():
    """Shapes alone, traced: 2**31 tiles or Gaussians never fit; that many pairs might."""

    def trace(num, views, size):
        shapes = [(num, 3), (num, 4), (num, 3), (num,), (num, 3)]
        g = Gaussians(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
        cameras = Cameras(*(jax.ShapeDtypeStruct((views, n, n), jnp.float32) for n in (4, 3)))
        return jax.eval_shape(lambda *x: rasterize(*x, width=size, height=size), g, cameras)

    with pytest.raises(ValueError, match="too many"):
        trace(2**27, 16, 16)
    with pytest.raises(ValueError, match="too many"):
        trace(1, 8, 2**17)
    with pytest.raises(ValueError, match="too many"):
        trace(1, 1, 2**16)
    assert trace(2**24, 9, 512).renders.shape == (9, 512, 512, 3)
    grid = binning.Grid(8, 512, 512)
    assert binning.default_capacity(9, 2**24, grid) == binning.MAX_PAIRS
    assert int(binning.saturating_sum(jnp.full(2**10, 2**22, jnp.int32))) > binning.MAX_PAIRS


def loss_of(implementation):
    def loss(arrays):
        g, cameras, features = arrays
        options = dict(**SIZE, antialiased=True, implementation=implementation)
        if implementation.startswith("pallas"):  # on any device, slowly
            options |= dict(near=0.01, far=np.inf, eps2d=0.3, with_depths=True, capacity=99)
            call = functools.partial(api._rasterize, interpret=True)
            result = call(g, cameras, features, jnp.ones(3), **options)
        else:
            result = rasterize(g, cameras, features=features, background=1.0, **options)
        return result.renders.sum() + result.depths.sum() + result.features.sum()

    return jax.value_and_grad(loss)


@pytest.mark.parametrize("implementation", list(api.IMPLEMENTATIONS))
def test_strict_promotion(implementation):
    """It makes the same program, whose values other files test."""
    arrays = jax.tree.map(jnp.asarray, (scene(), CAMERAS, np.ones((5, 2), np.float32)))
    with jax.numpy_dtype_promotion("strict"):
        strict = jax.make_jaxpr(loss_of(implementation))(arrays)
    assert str(strict) == str(jax.make_jaxpr(loss_of(implementation))(arrays))


def test_kernels_for_tpus_in_a_whole_call():
    arrays = jax.tree.map(jnp.asarray, (scene(), CAMERAS, np.ones((5, 2), np.float32)))
    (value, gradient), (want, wanted) = (loss_of(x)(arrays) for x in ("pallas_tpu", "xla"))
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-2)


def test_strict_promotion_of_mixed_types():
    g = scene()
    g = g._replace(means=jnp.asarray(g.means, jnp.bfloat16), colors=g.colors.astype(np.float64))
    with jax.numpy_dtype_promotion("strict"):
        assert rasterize(g, CAMERAS, **SIZE).renders.dtype == jnp.float32


def renders_sum(g):
    return rasterize(g, CAMERAS, **SIZE).renders.sum()


def test_derivatives_beyond_the_first_are_refused():
    g = jax.tree.map(jnp.asarray, scene())

    def twice(g):
        return sum(x.sum() for x in jax.grad(renders_sum)(g))

    with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
        jax.grad(twice)(g)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(renders_sum, (g,), (g,))


@functools.cache
def gradient_of(implementation, eps2d, antialiased):
    weights = np.random.default_rng(9).normal(size=(1, 16, 16, 5)).astype(np.float32)

    def loss(arrays):
        options = dict(implementation=implementation, eps2d=eps2d, antialiased=antialiased)
        result = rasterize(*arrays, **SIZE, **options)
        images = jnp.concatenate([result.renders, result.depths, result.alphas], axis=-1)
        return jnp.sum(images * weights), images

    return jax.jit(jax.grad(loss, has_aux=True))


def finite(implementation, eps2d, antialiased, g):
    arrays = jax.tree.map(jnp.asarray, (g, CAMERAS))
    gradient, images = gradient_of(implementation, eps2d, antialiased)(arrays)
    assert np.isfinite(images).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    return np.asarray(images)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_huge_gaussian_tints_the_picture_and_has_a_gradient(implementation):
    g = scene(64)
    g.scales[2], g.opacities[:2], g.opacities[3:] = 1e9, 0, 0
    images = finite(implementation, 0.3, False, g)
    np.testing.assert_allclose(images[..., 4], 0.7, atol=1e-5)


@pytest.mark.parametrize("eps2d, antialiased", [(0.0, False), (0.3, True)])
def test_a_finite_picture_has_finite_gradients(eps2d, antialiased):
    """Magnitudes from 1e-36 to 1e18 in every field, needles, zeros, the near plane."""
    rng = np.random.default_rng(0)
    for exponent in np.repeat([1, 3, 6, 9, 12, 15, 18], 6):
        g = scene(64, seed=int(rng.integers(1 << 30)))
        for x, low in ((g.means, 1), (g.quats, 2), (g.scales, 2)):
            size = 10 ** rng.uniform(-low * exponent, exponent, x.shape)
            x[:] = np.where(rng.random(x.shape) < 0.3, np.sign(x) * size, x)
        g.quats[rng.random(64) < 0.1] = 0
        g.scales[rng.random(64) < 0.1] = 0
        g.means[rng.random(64) < 0.1, 2] = -1.99
        some = rng.random(64) < 0.3
        g.opacities[some] = rng.choice([0, 1, 1 / 255, 0.999, 1e-30, 2, -1], some.sum())
        assert finite("xla", eps2d, antialiased, g).shape == (1, 16, 16, 5)
