"""SwiGLU: one product for both of its inputs, and the gradient of what lies between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from fourdstar_jax import nn, sharding
from fourdstar_jax.nn.linear import silu_times


@pytest.fixture(autouse=True)
def mesh():
    with sharding.use_mesh():
        yield


def plain(model, x):
    return model.down(nnx.silu(model.gate(x)) * model.up(x))


@pytest.mark.parametrize("tokens", [2, 64])  # fewer than the weights have outputs, and more
def test_a_swiglu_and_its_gradients_are_those_of_its_parts(tokens):
    model = nn.build(nn.SwiGLU, jax.random.key(0), dim=8, hidden_dim=12)
    x = jax.random.normal(jax.random.key(1), (tokens, 8))

    def loss(function):
        return lambda model, x: jnp.sum(jnp.sin(function(model, x)))

    np.testing.assert_allclose(model(x), plain(model, x), atol=1e-6)
    got = jax.grad(loss(lambda m, x: m(x)), (0, 1))(model, x)
    want = jax.grad(loss(plain), (0, 1))(model, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_its_gradient_is_that_of_finite_differences():
    both = jax.random.normal(jax.random.key(2), (5, 14))
    check_grads(
        lambda x: silu_times(jnp.asarray(x)), (both,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2
    )


def test_its_gradient_in_bfloat16_is_as_near_as_that_of_its_parts():
    both = jax.random.normal(jax.random.key(3), (256, 64))

    def of_parts(x):
        gate, up = jnp.split(x, 2, axis=-1)
        return nnx.silu(gate) * up

    def gradient(function, x):
        return jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32)))(x).astype(jnp.float32)

    want = gradient(of_parts, both)
    errors = [
        float(jnp.abs(gradient(f, both.astype(jnp.bfloat16)) - want).max())
        for f in (silu_times, of_parts)
    ]
    assert errors[0] < 1.5 * errors[1] < 0.1
