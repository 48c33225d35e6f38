"""The T5 encoder: its tokens are T5's, padding is not seen, distances are bucketed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import nn, sharding
from fourdstar_jax.text import pieces, t5
from fourdstar_jax.text.captions import NEUTRAL_PROMPT

SIZES = dict(vocab_size=19, dim=10, num_layers=2, num_heads=3, head_dim=4, hidden_dim=14)
TEXTS = [
    NEUTRAL_PROMPT,
    "a bull, attack headbutt",
    "  An Émigré's  robot -- 3.5 metres tall; <b>walking</b>\n",
    "",
    "wave " * 200,
    "日本語 text 🙂 with unknown pieces",
]


@pytest.fixture(scope="module")
def encoder():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return nn.build(t5.T5Encoder, jax.random.key(0), **SIZES)


@pytest.fixture(scope="module")
def original():
    """transformers' tokenizer from T5's own files, which users do not have."""
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "shared" / "weights" / "t5_tokenizer"
    if not folder.is_dir():
        pytest.skip("the files of T5's tokenizer are not here")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("length", [120, 7])
def test_ids_are_those_of_transformers(original, length):
    expected = original(
        [text.lower().strip() for text in TEXTS],
        max_length=length,
        padding="max_length",
        truncation=True,
        return_tensors="np",
    )
    ids, mask = pieces.tokenize(TEXTS, length)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))


def test_ids_end_with_the_end_mark_and_are_padded():
    ids, mask = pieces.tokenize(TEXTS, 11)
    assert ids.shape == mask.shape == (len(TEXTS), 11) and ids.dtype == np.int32
    for row, seen in zip(ids, mask, strict=True):
        count = seen.sum()
        assert (
            row[count - 1] == pieces.END
            and (row[count:] == pieces.PAD).all()
            and seen[:count].all()
        )
        assert (row[: count - 1] > 1).all()
    assert mask.sum(axis=1)[3] == 1 and mask.sum(axis=1)[4] == 11  # the empty and the long one
    with pytest.raises(ValueError, match="length=0"):
        pieces.tokenize(["a"], 0)


def test_padding_is_not_seen_and_its_amount_does_not_matter(encoder):
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 19, (3, 7)).astype(np.int32)
    mask = np.arange(7) < np.array([[2], [5], [7]])
    features = jax.jit(lambda e, ids, mask: e(ids, mask))
    out = features(encoder, ids, mask)
    other = features(encoder, np.where(mask, ids, 18 - ids), mask)
    assert out.shape == (3, 7, 10) and out.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(out)[mask], np.asarray(other)[mask])
    short = features(encoder, ids[:1, :2], mask[:1, :2])
    np.testing.assert_allclose(short[0], out[0, :2], rtol=0, atol=2e-6)
    # what is seen does matter
    assert np.abs(features(encoder, ids, mask | True) - out)[0, :2].max() > 1e-2


def test_places_matter_through_the_distances_alone(encoder):
    ids = jnp.array([[3, 4, 5, 6, 7]], jnp.int32)
    out, reverse = encoder(ids), encoder(ids[:, ::-1])
    assert np.abs(out - reverse[:, ::-1]).max() > 1e-2
    flat = jax.tree.map(lambda x: x, encoder)
    flat.distance_bias = jax.tree.map(jnp.zeros_like, encoder.distance_bias)
    np.testing.assert_allclose(flat(ids), flat(ids[:, ::-1])[:, ::-1], rtol=0, atol=2e-6)


def test_buckets():
    buckets = t5.relative_buckets(np.array([0, -1, 1, -7, 7, -8, 8, -127, 127, -128, 128, 10**6]))
    assert buckets.tolist() == [0, 1, 17, 7, 23, 8, 24, 15, 31, 15, 31, 31]
    line = t5.relative_buckets(np.arange(-300, 301))
    assert set(line.tolist()) == set(range(32)) - {16}  # 16 would be distance 0 after the query
    assert (np.diff(line[:301]) <= 0).all() and (np.diff(line[301:]) >= 0).all()


def test_the_norm_has_no_mean_and_queries_are_not_scaled(encoder):
    """One layer, written out in numpy float64."""
    layer = jax.tree.map(lambda x: np.asarray(x[0], np.float64), encoder.layers)
    rng = np.random.default_rng(1)
    x, length = rng.normal(3, 1, (1, 5, 10)), 5

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def get(linear):
        return np.asarray(linear.kernel[...])

    bias = np.asarray(encoder.bias(length), np.float64)
    y = norm(x, np.asarray(layer.attention_norm.scale[...]))
    q, k, v = ((y @ get(m)).reshape(5, 3, 4) for m in (layer.q, layer.k, layer.v))
    logits = np.einsum("qhe,khe->hqk", q, k) + bias
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    z = x + np.einsum("hqk,khe->qhe", weights, v).reshape(1, 5, 12) @ get(layer.out)
    y = norm(z, np.asarray(layer.ffn_norm.scale[...]))
    g = y @ get(layer.gate)
    g = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    expected = z + (g * (y @ get(layer.up))) @ get(layer.down)
    ours = jax.tree.map(lambda x: x[0], encoder.layers)
    out = ours(jnp.asarray(x, jnp.float32), encoder.bias(length), jnp.ones((1, 5), bool))
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)


def test_bfloat16_is_near_and_float16_refused(encoder):
    build = functools.partial(nn.build, t5.T5Encoder, jax.random.key(0), **SIZES)
    half = build(dtype=jnp.bfloat16)
    ids = jnp.array([[3, 4, 5, 6, 7]], jnp.int32)
    error = np.abs(half(ids) - encoder(ids)).max()
    assert 0 < error < 0.1  # bfloat16 has 8 bits; features are O(1)
    with pytest.raises(ValueError, match="float16 overflows"):
        build(dtype=jnp.float16)
    with pytest.raises(ValueError, match="num_buckets=6"):
        build(num_buckets=6)


def test_the_size_of_flan_t5_xl():
    sizes = dict(vocab_size=32128, dim=2048, num_layers=24, num_heads=32, head_dim=64)
    build = functools.partial(nn.build, t5.T5Encoder, **sizes, hidden_dim=5120)
    shapes = jax.tree.leaves(jax.eval_shape(build, jax.random.key(0)))
    assert sum(x.size for x in shapes) == 1_223_527_424  # transformers' count for the encoder
