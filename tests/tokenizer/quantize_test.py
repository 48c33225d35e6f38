import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import nn
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.quantize import Quantizer, QuantizerStats

K, VOCAB, D, B, N = 3, 11, 15, 2, 7


@pytest.fixture
def quantizer():
    return nn.build(Quantizer, jax.random.key(0), num_codebooks=K, vocab_size=VOCAB, code_dim=D)


@pytest.fixture
def vectors():
    return jax.random.normal(jax.random.key(1), (B, N, D))


def test_tokens_are_of_largest_cosine(quantizer, vectors):
    codebooks = np.asarray(quantizer.codebooks[...])
    tokens = np.asarray(quantizer.encode(vectors))
    for b, n, k in np.ndindex(B, N, K):
        chunk = np.asarray(vectors)[b, n, 5 * k : 5 * k + 5]
        cosines = [
            row @ chunk / np.linalg.norm(row) / np.linalg.norm(chunk) for row in codebooks[k]
        ]
        assert tokens[b, n, k] == np.argmax(cosines)


def test_length_of_vectors_and_codebooks_does_not_matter(quantizer, vectors):
    scale = jnp.arange(1.0, VOCAB + 1)[:, None]
    scaled = quantize.nearest(quantizer.chunks(vectors) * 3.0, quantizer.codebooks[...] * scale)
    np.testing.assert_array_equal(scaled, quantizer.encode(vectors))


def test_codes_keep_their_tokens(quantizer, vectors):
    tokens = quantizer.encode(vectors)
    codes = quantizer.codes(tokens)
    np.testing.assert_array_equal(quantizer.encode(codes), tokens)
    lengths = np.linalg.norm(np.asarray(codes).reshape(B, N, K, -1), axis=-1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)


def test_tie_takes_the_first():
    book = jnp.tile(jnp.array([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]), (2, 1, 1))
    tokens = quantize.nearest(jnp.array([[[1.0, 0.0], [0.0, 5.0]]]), book)
    np.testing.assert_array_equal(tokens, [[1, 0]])


def test_gradient_passes_straight_through(quantizer, vectors):
    weights = jax.random.normal(jax.random.key(2), vectors.shape)

    def through(x):
        return jnp.sum(quantizer(x).codes * weights)

    def around(x):  # the same without quantising
        return jnp.sum(quantizer.chunks(x).reshape(x.shape) * weights)

    np.testing.assert_allclose(jax.grad(through)(vectors), jax.grad(around)(vectors), rtol=1e-5)


def test_loss_is_codebook_plus_quarter_commitment(quantizer, vectors):
    out = quantizer(vectors)
    error = np.mean(
        (np.asarray(quantizer.codes(out.tokens)) - quantizer.chunks(vectors).reshape(B, N, D)) ** 2
    )
    np.testing.assert_allclose(out.loss, 1.25 * error, rtol=1e-5)
    grads = jax.grad(lambda q: q(vectors).loss, allow_int=True)(quantizer)
    used = np.asarray(out.stats.usage) > 0
    touched = np.linalg.norm(np.asarray(grads.codebooks[...]), axis=-1) > 0
    np.testing.assert_array_equal(touched, used)


def test_statistics_count_and_the_module_is_not_changed(quantizer, vectors):
    out = quantizer(vectors)
    counts = np.zeros((K, VOCAB))
    for ids in np.asarray(out.tokens).reshape(-1, K):
        counts[np.arange(K), ids] += 1
    share = counts / (B * N)
    np.testing.assert_allclose(out.stats.usage, 0.01 * share, rtol=1e-5)
    np.testing.assert_array_equal(out.stats.idle_steps, (counts == 0).astype(int))
    logs = np.log(np.where(share > 0, share, 1))
    np.testing.assert_allclose(
        out.perplexity, np.mean(np.exp(-np.sum(share * logs, axis=-1))), rtol=1e-5
    )
    assert not np.any(quantizer.stats().usage) and not np.any(quantizer.stats().idle_steps)


def test_dead_codes_are_reseeded_from_current_vectors(quantizer, vectors):
    idle = jnp.zeros((K, VOCAB), jnp.int32).at[1, 4].set(200).at[2, 0].set(199)
    stats = QuantizerStats(jnp.ones((K, VOCAB)) / VOCAB, idle)
    chunks = quantizer.chunks(vectors)
    books, after, count = quantize.repair_dead_codes(
        quantizer.normalized(), stats, chunks, jax.random.key(3), max_idle_steps=200
    )
    assert count == 1
    changed = np.any(np.asarray(books) != np.asarray(quantizer.normalized()), axis=-1)
    assert changed[1, 4] and changed.sum() == 1
    pool = np.asarray(chunks)[:, :, 1].reshape(-1, D // K)
    assert np.any(np.all(pool == np.asarray(books)[1, 4], axis=-1))
    np.testing.assert_array_equal(after.idle_steps, idle.at[1, 4].set(0))


def test_start_from_data_replaces_all(quantizer, vectors):
    _, _, count = quantize.repair_dead_codes(
        quantizer.normalized(),
        quantizer.stats(),
        quantizer.chunks(vectors),
        jax.random.key(3),
        max_idle_steps=0,
    )
    assert count == K * VOCAB


def test_code_dim_must_divide():
    with pytest.raises(ValueError, match="code_dim"):
        nn.build(Quantizer, jax.random.key(0), num_codebooks=3, vocab_size=5, code_dim=16)


def test_near_codes_are_those_of_largest_cosine(quantizer):
    near = np.asarray(quantize.near_codes(quantizer.codebooks[...], 4))
    books = np.asarray(quantizer.normalized())
    for k, code in np.ndindex(K, VOCAB):
        order = np.argsort(-books[k] @ books[k][code])
        np.testing.assert_array_equal(near[k, code], order[order != code][:4])
    with pytest.raises(ValueError, match=f"near={VOCAB} must be .* below the {VOCAB} codes"):
        quantize.near_codes(quantizer.codebooks[...], VOCAB)


def test_the_blank_code_is_near_to_none(quantizer):
    """Neither is it taken for another, nor another for it."""
    near = quantize.near_codes(quantizer.codebooks[...], VOCAB - 2, has_blank=True)
    assert np.all(np.asarray(near)[:, quantize.BLANK] == quantize.BLANK)
    for k, code in np.ndindex(K, VOCAB):
        if code != quantize.BLANK:
            wanted = set(range(VOCAB)) - {code, quantize.BLANK}
            assert set(np.asarray(near)[k, code].tolist()) == wanted
    tokens = jax.random.randint(jax.random.key(2), (50, 40, K), 0, VOCAB)
    found = quantize.corrupt(jax.random.key(3), tokens, near, 1.0)
    np.testing.assert_array_equal(found == quantize.BLANK, tokens == quantize.BLANK)
    assert np.all((found != tokens) | (tokens == quantize.BLANK))
    with pytest.raises(
        ValueError, match=f"near={VOCAB - 1} must be .* below the {VOCAB - 1} codes"
    ):
        quantize.near_codes(quantizer.codebooks[...], VOCAB - 1, has_blank=True)


def test_corrupted_codes_are_near_ones_and_as_many_as_asked_for(quantizer):
    near = quantize.near_codes(quantizer.codebooks[...], 4)
    tokens = jax.random.randint(jax.random.key(2), (50, 40, K), 0, VOCAB)
    found = np.asarray(quantize.corrupt(jax.random.key(3), tokens, near, 0.2))
    wrong = found != np.asarray(tokens)
    np.testing.assert_allclose(wrong.mean(axis=(0, 1)), 0.2, atol=0.03)
    for b, n, k in np.argwhere(wrong):
        assert found[b, n, k] in np.asarray(near)[k, tokens[b, n, k]]
    np.testing.assert_array_equal(quantize.corrupt(jax.random.key(3), tokens, near, 0.0), tokens)
