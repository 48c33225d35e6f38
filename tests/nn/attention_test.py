"""Attention of queries in parts against all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.nn import attention


@pytest.mark.parametrize("most", [1, 100, 3 * 2 * 6 * 5])
def test_parts_change_nothing(monkeypatch, most):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 6, 3, 4))  # 6 queries, 180 scores
    k, v = (jax.random.normal(key, (2, 5, 3, 4)) for key in keys[1:])

    def run(q, k, v):
        y = attention.attend(q, k, v)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.grad(run, (0, 1, 2), has_aux=True)
    wanted = gradient(q, k, v)
    monkeypatch.setattr(attention, "MOST_SCORES", most)
    loops = "while" in jax.jit(lambda *qkv: attention.attend(*qkv)).lower(q, k, v).as_text()
    assert loops == (most < 180)
    for a, b in zip(jax.tree.leaves(gradient(q, k, v)), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_sums_are_attention_of_few_slots():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 6, 5, 4, 8))

    def run(attend):
        def loss(q, k, v):
            y = attend(q, k[:, :, ::2], v[:, :, ::2])  # two heads of keys for four of queries
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    got, want = run(attention.by_sums), run(attention.attend_short)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_cudnn_does_not_take_is_plain(monkeypatch):
    """Odd numbers of queries or keys, as of one timestep."""
    asked = []
    call = jax.nn.dot_product_attention

    def fake(*args, implementation, **kwargs):
        asked.append(implementation)
        return call(*args, **kwargs)

    monkeypatch.setattr(attention, "fits_cudnn", lambda q: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    attention.attend(x, x, x)
    attention.attend(x[:, :1], x, x)
    attention.attend(x, x[:, :3], x[:, :3])
    assert asked == ["cudnn", None, None]
