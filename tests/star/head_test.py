"""The depth head and the sampler's filters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import nn, sharding
from fourdstar_jax.star.head import DepthHead, filter_logits, kept_odds

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


def test_a_code_keeps_its_odds_when_it_is_cold():
    """Blank has .4, a hundred others share .6: cold, it would win, and it must not."""
    logits = jnp.log(jnp.concatenate([jnp.array([0.4, 0.1]), jnp.full(100, 0.005)]))[None]
    assert jax.nn.softmax(logits / 0.5)[0, 0] > 0.9
    kept = kept_odds(logits, 0, jnp.float32(0.5))
    shares = np.asarray(jax.nn.softmax(kept / 0.5)[0])
    np.testing.assert_allclose(shares[0], 0.4, rtol=1e-5)
    np.testing.assert_allclose(shares[1] / shares[2], (0.1 / 0.005) ** 2, rtol=1e-4)  # these cool
    assert jnp.argmax(kept_odds(logits, 0, None)) == 1  # not blank is likelier
    likely = logits.at[0, 0].add(1.0)
    assert jnp.argmax(kept_odds(likely, 0, None)) == 0
    np.testing.assert_allclose(kept_odds(logits, 0, jnp.float32(1.0)), logits, atol=1e-5)
