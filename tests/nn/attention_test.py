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


def test_short_sequences_are_packed_into_tiles(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(1), (3, 6, 5, 4, 8))
    want = attention.attend_short(q, k[:, :, ::2], v[:, :, ::2])
    packed, plain = [], jax.nn.dot_product_attention

    def call(q, k, v, *, mask, implementation):
        packed.append((q.shape[0], implementation))
        return plain(q, k, v, mask=jnp.asarray(mask))

    monkeypatch.setattr(attention, "fits_cudnn", lambda q: True)
    monkeypatch.setattr(attention, "TILE", 19)  # three sequences of five
    monkeypatch.setattr(jax.nn, "dot_product_attention", call)
    got = attention.attend_short(q, k[:, :, ::2], v[:, :, ::2])
    assert packed == [(2, "cudnn")]
    np.testing.assert_allclose(got, want, atol=1e-6)
