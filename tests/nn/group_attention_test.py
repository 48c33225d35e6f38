"""Attention of groups in parts against one masked softmax, values and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import nn, sharding
from fourdstar_jax.nn import attention, group_attention, splash
from fourdstar_jax.star.transformer import group_mask

B, G, Q, P, E = 2, 3, 7, 5, 8


def example(heads=6, kv_heads=3, dtype=jnp.float32, dim=E, batch=B):
    keys = jax.random.split(jax.random.key(0), 6)
    shapes = [(G, Q, heads), (P, kv_heads), (P, kv_heads), (G, Q, kv_heads), (G, Q, kv_heads)]
    made = [
        2 * jax.random.normal(key, (batch, *shape, dim), dtype)
        for key, shape in zip(keys, shapes, strict=False)
    ]
    return made, jax.random.normal(keys[5], made[0].shape, dtype)


def masked(q, shared_k, shared_v, k, v, num_open):
    """The same by one mask over repeated keys."""
    k, v = (
        jnp.concatenate([jnp.repeat(a[:, None], G, axis=1), b], axis=2).reshape(
            -1, P + Q, *b.shape[3:]
        )
        for a, b in ((shared_k, k), (shared_v, v))
    )
    mask = jnp.asarray(group_mask(P, num_open, Q - num_open))[None, None]
    return nn.attend(q.reshape(-1, *q.shape[2:]), k, v, mask=mask).reshape(q.shape)


def grouped(q, shared_k, shared_v, k, v, num_open, **options):
    return nn.attend_groups(q, (shared_k, shared_v), (k, v), num_open, **options)


@functools.partial(jax.jit, static_argnums=0)
def both(function, arrays, dout):
    y, pull = jax.vjp(function, *arrays)
    return [y, *pull(dout)]


@pytest.mark.parametrize("num_open, heads", [(2, (6, 3)), (0, (2, 2)), (Q, (2, 1))])
def test_parts_equal_the_masked_softmax(num_open, heads):
    arrays, dout = example(*heads)
    got = both(functools.partial(grouped, num_open=num_open), arrays, dout)
    want = both(functools.partial(masked, num_open=num_open), arrays, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_tpu_kernel_gives_the_same():
    """Interpreted; the lengths are not those of its blocks."""
    arrays, dout = example(heads=2, kv_heads=1, batch=1)
    want = both(functools.partial(masked, num_open=2), arrays, dout)
    got = both(functools.partial(grouped, num_open=2, implementation="splash"), arrays, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_blocks_and_causal_halves_of_a_tpu_kernel(monkeypatch):
    """Two blocks of queries, three of keys, the last ones not full; and it lowers for a TPU."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, n, h, 8))
        for key, n, h in zip(keys, (200, 300, 300), (2, 1, 1), strict=True)
    )
    for causal, arrays in ((False, (q, k, v)), (True, (q, k[:, :200], v[:, :200]))):
        got = both(functools.partial(splash.attend, causal=causal), arrays, q)
        want = both(functools.partial(nn.attend, causal=causal), arrays, q)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)

    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v)]
    lowered = jax.jit(lambda *x: jax.grad(lambda *y: nn.attend(*y).sum())(*x)).trace(*arrays)
    text = lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 3  # forward; queries' gradients, keys' and values'


def test_queries_in_parts_change_nothing(monkeypatch):
    arrays, dout = example()
    want = both(functools.partial(grouped, num_open=2), arrays, dout)
    monkeypatch.setattr(attention, "MOST_SCORES", 300)  # 21 queries in 7 parts of 180 scores
    got = both(functools.partial(grouped, num_open=2), arrays, dout)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bfloat16_stays_near_float32():
    arrays, dout = example(dtype=jnp.bfloat16)
    got = both(functools.partial(grouped, num_open=2), arrays, dout)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = both(functools.partial(grouped, num_open=2), exact, dout.astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        error = jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)
        assert error < 1e-2  # of 8 bits


@pytest.mark.parametrize("mesh_shape", [dict(data=4, tensor=2), dict(data=2, fsdp=4)])
def test_the_mesh_splits_batch_and_heads(mesh_shape):
    arrays, dout = example(heads=4, kv_heads=2, batch=8)
    function = functools.partial(grouped, num_open=2)
    want = both(function, arrays, dout)
    with sharding.use_mesh(mesh_shape) as mesh:
        place = sharding.named(mesh, "batch")
        compiled = both.lower(function, *jax.device_put((arrays, dout), place)).compile()
        got = compiled(*jax.device_put((arrays, dout), place))
    assert "all-gather" not in str(compiled.as_text())
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_cudnn_lowers_for_gpus_that_are_not_here():
    arrays, dout = example(dtype=jnp.bfloat16, dim=64)
    function = functools.partial(grouped, num_open=2, implementation="cudnn")
    text = both.trace(function, arrays, dout).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__cudnn$fmhaSoftmax(") == text.count("@__cudnn$fmhaSoftmaxBackward(") == 3
    shared = f"[\\22{B}\\22, \\226\\22, \\22{G * Q}\\22, \\22{P}\\22]"
    assert shared in text  # all groups' queries over keys that are there once


def test_results_are_kept_where_a_policy_says_so():
    arrays, _ = example()

    def loss(saves, *arrays):
        once = nn.recomputed(functools.partial(grouped, num_open=2), True, saves=saves)
        return jnp.sum(jnp.sin(once(*arrays)))

    def softmaxes(saves):
        return str(jax.make_jaxpr(jax.grad(functools.partial(loss, saves)))(*arrays)).count(
            "logaddexp"
        )

    assert softmaxes("attention") < softmaxes("nothing")
    assert group_attention.SAVED in str(
        jax.make_jaxpr(functools.partial(loss, "attention"))(*arrays)
    )
