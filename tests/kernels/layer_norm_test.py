"""The fused LayerNorm: kernel body and plain form against each other, numpy and flax."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import sharding
from fourdstar_jax.kernels.devices import why_no_mosaic_gpu
from fourdstar_jax.kernels.layer_norm import add_layer_norm, api, bench, reference
from fourdstar_jax.kernels.layer_norm.kernel import fused
from fourdstar_jax.kernels.layer_norm.kernel import norms_of as norms_with

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu",
    reason="exact up to one rounding, which holds on a CPU: other backends fuse otherwise",
)
EPSILONS = (1e-6, 1e-5)
BF16 = 2.0**-8  # half a unit in the last place of one
CASES = [(norms, y, half) for norms in (1, 2) for y in (None, "y", "bias") for half in (0, 1)]


def arguments(number, y, half, width=128, rows=(3, 4)) -> Any:
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.float32, scale=1.0, mean=0.0):
        return jnp.asarray(mean + scale * rng.standard_normal(shape), dtype)

    x = array(*rows, width, dtype=jnp.bfloat16 if half else jnp.float32, scale=3.0, mean=0.5)
    pairs = tuple(
        (array(width, scale=0.3, mean=1.0), array(width, scale=0.3)) for _ in range(number)
    )
    bias = array(width, scale=0.5) if y == "bias" else None
    return x, None if y is None else array(*rows, width, dtype=jnp.bfloat16), bias, pairs


def norms_of(pairs):
    return norms_with(EPSILONS[: len(pairs)], pairs)


def plain(x, y, bias, pairs):
    return reference.add_layer_norm(x, y, norms_of(pairs), bias, jnp.bfloat16)


def kernel(x, y, bias, pairs) -> Any:
    return fused(EPSILONS[: len(pairs)], True, x, y, bias, pairs)


def in_numpy(x, y, bias, pairs):
    """Float64, and rounded where the plain form rounds."""

    def half(v):
        return np.asarray(jnp.asarray(v, jnp.float32).astype(jnp.bfloat16)).astype(np.float64)

    total = np.asarray(x).astype(np.float64)
    if y is not None:
        y = np.asarray(y).astype(np.float64)
        y = y if bias is None else half(y + half(bias))
        total = total + y
        total = half(total) if x.dtype == jnp.bfloat16 else total.astype(np.float32)
    z = half(total)
    for (scale, shift), epsilon in zip(pairs, EPSILONS, strict=False):
        centred = z - z.mean(-1, keepdims=True)
        z = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
        z = half(z * half(scale) + half(shift))
    return total, z


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("function", [plain, kernel])
@pytest.mark.parametrize("number, y, half", CASES)
def test_against_numpy(function, number, y, half, compiled):
    args = arguments(number, y, half)
    total, z = (jax.jit(function) if compiled else function)(*args)
    wanted_total, wanted = in_numpy(*args)
    assert total.dtype == args[0].dtype and z.dtype == jnp.bfloat16
    assert total.shape == z.shape == args[0].shape
    exact = not (compiled and function is plain)  # XLA leaves out roundings in between
    np.testing.assert_allclose(
        np.asarray(total, np.float32),
        wanted_total,
        rtol=0 if exact else BF16,
        atol=2e-2 * (not exact),
    )
    z = np.asarray(z).astype(np.float64)
    # A number near the middle of two bfloat16 ones may go to either; a second norm scales that.
    np.testing.assert_allclose(z, wanted, rtol=3 * BF16, atol=3 * BF16)
    if exact:
        assert np.mean(z != wanted) < 0.01


@pytest.mark.parametrize("number, y, half", CASES)
def test_gradients_are_the_plain_ones(number, y, half):
    args = arguments(number, y, half)
    weights = arguments(1, "y", half)[:2]
    weights = [w[::-1, :, ::-1].astype(jnp.float32) for w in weights]

    def loss(function, args):
        out = function(*args)
        return sum(jnp.sum(w * v.astype(jnp.float32)) for w, v in zip(weights, out, strict=True))

    wanted = jax.grad(functools.partial(loss, plain))(args)
    found = jax.grad(functools.partial(loss, kernel))(args)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        assert np.linalg.norm(a - b) <= 4 * BF16 * np.linalg.norm(b)
        assert np.any(b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_form_is_flaxs(dtype):
    layers = [nnx.LayerNorm(128, epsilon=e, dtype=dtype, rngs=nnx.Rngs(0)) for e in EPSILONS]
    x, y, bias, pairs = arguments(2, "bias", False)
    for layer, (scale, shift) in zip(layers, pairs, strict=True):
        vars(layer)["scale"].set_value(scale)
        vars(layer)["bias"].set_value(shift)
    total, z = add_layer_norm(x, y, norms_of(pairs), bias=bias, dtype=dtype)
    np.testing.assert_array_equal(total, x + (y + bias.astype(y.dtype)))
    np.testing.assert_array_equal(z, layers[1](layers[0](total)))


def test_vmap():
    x, y, bias, pairs = arguments(2, "bias", True)
    for axes in ((0, 0, None, None), (None, 0, None, None), (1, 1, None, None)):
        found = jax.vmap(kernel, axes)(x if axes[0] is not None else x[0], y, bias, pairs)
        wanted = jax.vmap(plain, axes)(x if axes[0] is not None else x[0], y, bias, pairs)
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def test_where_it_runs(monkeypatch):
    x, y, _, _ = arguments(1, "y", True)
    assert not api.fits(x, y, jnp.dtype(jnp.bfloat16))  # not a GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(api, "why_no_mosaic_gpu", lambda: None)

    def fits(x=x, y=y, dtype=jnp.bfloat16):
        return api.fits(x, y, jnp.dtype(dtype))

    with sharding.use_mesh(devices=jax.devices()[:1]):
        assert fits() and fits(y=None) and fits(x.astype(jnp.float32))
        assert not fits(dtype=jnp.float32)
        assert not fits(y=y.astype(jnp.float32))
        assert not fits(x[:, :, :127]) and not fits(x[:, :, :64])  # widths
        assert not fits(x[:, :3])  # nine rows
        assert not fits(x[:0])
        assert not fits(jnp.zeros((4, 4096), jnp.bfloat16), None)
        assert not fits(jnp.zeros((4, 384), jnp.bfloat16), None)
    if jax.device_count() > 1:
        with sharding.use_mesh():
            assert not fits()


@pytest.mark.parametrize("width", [128, 256, 1024, 2048])
@pytest.mark.parametrize("number, y, half", [(2, "bias", 1), (1, None, 0)])
def test_lowers_for_a_gpu(width, number, y, half):
    x, y, bias, pairs = arguments(number, y, half, width)
    traced = jax.jit(lambda *args: fused(EPSILONS[:number], False, *args))
    text = traced.trace(x, y, bias, pairs).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_wrong_arguments():
    x, _, bias, pairs = arguments(1, "bias", True)
    with pytest.raises(ValueError, match="must be 1 or 2"):
        add_layer_norm(x, None, [])
    with pytest.raises(ValueError, match="y is None"):
        add_layer_norm(x, None, norms_of(pairs), bias=bias)


def test_bench(monkeypatch, tmp_path, capsys):
    """On the CPU the definition alone is timed; the kernel's line says why not."""
    monkeypatch.setattr(bench, "SHAPES", {"toy": (8, 128)})
    results = bench.run(repeats=2, json_file=tmp_path / "new" / "results.json")
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == results
    lines = results["results"]
    wanted = ["reference"] if why_no_mosaic_gpu() else ["reference", "kernel"]
    assert [line["who"] for line in lines] == wanted
    for line in lines:
        assert line["sync_ms"] > 0
        assert line["bytes_per_s"] == pytest.approx(8192e3 / line["back_to_back_ms"])
    assert ("compute capability 9.0" in capsys.readouterr().out) == (len(lines) == 1)
