"""Blocks against their layers one by one, in both precisions and with the kernel's body."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import nn
from fourdstar_jax.kernels.layer_norm import api, kernel
from fourdstar_jax.nn import vit


def by_linear_layers(block, x):
    """A block as its layers say: every bias where it is, no sum or norm together with another."""
    attn, mlp = block.attn, block.mlp
    qkv = attn.qkv(block.norm1(x)).reshape(*x.shape[:2], 3, attn.num_heads, -1)
    y = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0))
    x = x + attn.proj(y.reshape(x.shape))
    z = mlp.norm(block.norm2(x))
    return x + mlp.w2(nnx.gelu(mlp.w0(z), approximate=True) * mlp.w1(z))


def random_block(dtype):
    """All parameters of order one where that is harmless; the biases of keys and values too."""
    make = functools.partial(vit.Block, 128, 2, 40, dtype=dtype)
    block = nn.build(make, jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: x + rng.normal(0, 0.5 if x.ndim == 1 else 0.02, x.shape).astype(x.dtype), block
    )


def close(found, wanted, units):
    """Within some bfloat16 roundings of a number of the size of the largest."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=units * 2.0**-8 * np.abs(wanted).max())


def test_block_is_its_layers():
    block, x = random_block(jnp.float32), jax.random.normal(jax.random.key(2), (2, 6, 128))
    np.testing.assert_allclose(block(x), by_linear_layers(block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_half_precision_block(monkeypatch, dtype):
    """Biases in other places, and the kernel's body, change no more than roundings."""
    wide, half = random_block(jnp.float32), random_block(jnp.bfloat16)
    x = jax.random.normal(jax.random.key(2), (2, 6, 128), dtype)
    assert half(x).dtype == dtype
    exact = wide(x.astype(jnp.float32))
    close(half(x), exact, 3)
    close(by_linear_layers(half, x), exact, 3)
    before = jax.jit(lambda block, x: block(x))(half, x)

    def gradient(block):
        return jax.grad(lambda b: jnp.mean(b(x).astype(jnp.float32) ** 2))(block)

    wanted = gradient(half)
    calls = []

    def fits(x, y, dtype):
        calls.append(x.shape)
        return dtype == jnp.bfloat16

    monkeypatch.setattr(api, "fits", fits)
    monkeypatch.setattr(kernel, "mosaic", kernel.interpreted)
    kernel.launch.clear_cache()
    after = jax.jit(lambda block, x: block(x))(half, x)
    close(after, before, 3)
    close(after, exact, 3)
    assert after.dtype == before.dtype and len(calls) == 2
    for a, b in zip(jax.tree.leaves(gradient(half)), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(v, np.float32) for v in (a, b))
        assert np.linalg.norm(a - b) <= 0.02 * np.linalg.norm(b)
    kernel.launch.clear_cache()


def test_gelu_in_bfloat16_is_the_exact_one_but_for_rounding():
    x = jnp.linspace(-8, 8, 20001).astype(jnp.bfloat16)
    exact = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    error = jnp.abs(vit.gelu(x).astype(jnp.float32) - exact)
    assert vit.gelu(x).dtype == jnp.bfloat16
    # half a bfloat16 step of the result, and the polynomial's own error
    assert jnp.all(error <= 2.0**-8 * jnp.abs(exact) + 7e-5)
    tanh = jax.nn.gelu(x.astype(jnp.float32), approximate=True)
    assert jnp.abs(tanh - exact).max() > 4e-4  # the other form would be told
