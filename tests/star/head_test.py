"""The depth head and the sampler's filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import nn, sharding
from fourdstar_jax.star.head import DepthHead, cooled, filter_logits, likeliest

K, VOCAB = 3, 7


@pytest.fixture(scope="module")
def head():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        head = nn.build(
            DepthHead, jax.random.key(0), dim=11, head_dim=10, num_layers=2, num_heads=5,
            hidden_dim=13, num_codebooks=K, vocab_size=VOCAB, init=nnx.initializers.normal(0.3),
            dtype=jnp.float32,
        )  # fmt: skip
    assert not head.output[...].any()  # zero at the start
    head.output[...] = jax.random.normal(jax.random.key(1), head.output.shape)
    return head


def test_teacher_forcing_equals_step_by_step(head):
    hidden = jax.random.normal(jax.random.key(2), (5, 11))
    tokens = jax.random.randint(jax.random.key(3), (5, K), 0, VOCAB)
    forced, logits = jax.jit(lambda m, h, t: m.decode(h, lambda k, _: t[:, k]))(
        head, hidden, tokens
    )
    np.testing.assert_array_equal(forced, tokens)
    np.testing.assert_allclose(logits, head(hidden, tokens), atol=1e-5)
    greedy, logits = head.decode(hidden, lambda k, logits: jnp.argmax(logits, axis=-1))
    np.testing.assert_array_equal(greedy, jnp.argmax(head(hidden, greedy), axis=-1))


def test_a_code_changes_the_logits_of_later_codes_only(head):
    hidden = jax.random.normal(jax.random.key(2), (5, 11))
    tokens = jax.random.randint(jax.random.key(3), (5, K), 0, VOCAB)
    before = head(hidden, tokens)
    for k in range(K):
        after = head(hidden, tokens.at[:, k].set((tokens[:, k] + 1) % VOCAB))
        changed = jnp.abs(after - before).max(axis=(0, 2)) > 1e-6
        np.testing.assert_array_equal(changed, np.arange(K) > k)


def test_one_codebook_needs_no_table():
    head = nn.build(
        DepthHead, jax.random.key(0), dim=11, head_dim=10, num_layers=1, num_heads=1,
        hidden_dim=13, num_codebooks=1, vocab_size=VOCAB, init=nnx.initializers.normal(0.3),
        dtype=jnp.float32,
    )  # fmt: skip
    assert head(jnp.ones((5, 11)), jnp.zeros((5, 1), jnp.int32)).shape == (5, 1, VOCAB)


def test_filters():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.05, 0.25, 0.2]))
    kept = lambda **kw: list(np.flatnonzero(jnp.isfinite(filter_logits(logits, **kw))))  # noqa: E731
    assert kept(top_k=2, top_p=None) == [1, 3]
    assert kept(top_k=9, top_p=None) == [0, 1, 2, 3, 4]
    assert kept(top_k=None, top_p=jnp.float32(0.6)) == [1, 3]
    assert kept(top_k=None, top_p=jnp.float32(0.7)) == [1, 3, 4]
    assert kept(top_k=None, top_p=jnp.float32(1e-6)) == [1]
    assert kept(top_k=None, top_p=jnp.float32(1.0)) == [0, 1, 2, 3, 4]


def test_parallel_codes_know_nothing_of_one_another():
    head = nn.build(
        DepthHead, jax.random.key(0), dim=11, head_dim=10, num_layers=1, num_heads=1,
        hidden_dim=13, num_codebooks=K, vocab_size=VOCAB, parallel=True,
        init=nnx.initializers.normal(0.3), dtype=jnp.float32,
    )  # fmt: skip
    head.output[...] = jax.random.normal(jax.random.key(1), head.output.shape)
    hidden = jax.random.normal(jax.random.key(2), (5, 11))
    codes, logits = head.decode(hidden, lambda k, logits: jnp.argmax(logits, axis=-1) + 0 * k)
    assert codes.shape == (5, K)
    np.testing.assert_allclose(logits, head(hidden, (codes + 1) % VOCAB), atol=1e-6)
    assert jnp.abs(logits[:, 0] - logits[:, 1]).max() > 0.1  # each by weights of its own


@pytest.mark.parametrize("temperature", [1e-40, 1e-9, 0.5, 1.0, 30.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": jnp.float32(0.4)}])
def test_a_code_keeps_its_odds(temperature, filters):
    """Blank has .4, a hundred others share .6: cold, it would win, and it must not."""
    logits = jnp.log(jnp.concatenate([jnp.array([0.4, 0.1]), jnp.full(100, 0.005)]))[None]
    assert jax.nn.softmax(logits / 0.5)[0, 0] > 0.9
    every = {"top_k": None, "top_p": None} | filters
    shares = jax.nn.softmax(cooled(logits, jnp.float32(temperature), keep=0, **every)[0])
    np.testing.assert_allclose(shares[0], 0.4, rtol=1e-5)
    if temperature == 0.5 and not filters:  # these cool
        np.testing.assert_allclose(shares[1] / shares[2], (0.1 / 0.005) ** 2, rtol=1e-4)
    if temperature < 1e-6:
        np.testing.assert_allclose(shares[1], 0.6, rtol=1e-5)
    if "top_p" in filters and temperature < 1:
        assert (shares > 0).sum() == 2


def test_the_likeliest_code():
    logits = jnp.log(jnp.array([[0.4, 0.1, 0.3, 0.2], [0.6, 0.1, 0.2, 0.1]]))
    np.testing.assert_array_equal(likeliest(logits), [0, 0])
    np.testing.assert_array_equal(likeliest(logits, 0), [2, 0])


def test_cooling_without_such_a_code():
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    found = cooled(logits, jnp.float32(0.5), top_k=3, top_p=None)
    np.testing.assert_allclose(found, filter_logits(logits / 0.5, top_k=3, top_p=None))
