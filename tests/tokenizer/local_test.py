"""The local tokenizer: how far a patch reaches, blank patches, and all that a tokenizer does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import bundle, nn, tokenizer
from fourdstar_jax.tokenizer.base import Tokenizer
from fourdstar_jax.tokenizer.local import LocalTokenizer
from fourdstar_jax.tokenizer.losses import tokenizer_loss
from fourdstar_jax.tokenizer.measures import (
    HALF_STEP,
    code_counts,
    code_use,
    steadiness,
    steadiness_counts,
)
from fourdstar_jax.tokenizer.quantize import BLANK

PATCH, GRID, K, VOCAB = 8, 5, 3, 13
SIZE = PATCH * GRID
MODEL = dict(
    family="local", resolution=SIZE, stem_channels=[5, 7], dim=12, num_decoder_blocks=1,
    tail_channels=[7, 5], num_codebooks=K, vocab_size=VOCAB, code_dim=6,
)  # fmt: skip


@functools.cache
def fresh():
    return nn.build(tokenizer.make, jax.random.key(0), **MODEL)


@functools.cache
def compiled(name):
    return jax.jit(lambda model, *args: getattr(model, name)(*args))


def call(name, *args, model=None):
    """A method of `fresh()`, or of another model, compiled."""
    return compiled(name)(fresh() if model is None else model, *args)


def pictures(*leading, seed=0):
    return np.random.default_rng(seed).random((*leading, SIZE, SIZE, 3), np.float32)


def patch_of(row, column):
    return np.s_[
        ..., row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH, slice(None)
    ]


def objects(*leading, seed=0):
    """Random patches in the middle 3x3 of white pictures."""
    images = np.ones((*leading, SIZE, SIZE, 3), np.float32)
    inner = np.s_[..., PATCH:-PATCH, PATCH:-PATCH, :]
    images[inner] = pictures(*leading, seed=seed)[inner]
    return images


def grid_of(values):
    return np.asarray(values).reshape(*values.shape[:-2], GRID, GRID, values.shape[-1])


def test_protocol():
    """Leading axes are free; an object's patches never get a blank code; images stay in range."""
    model, images = fresh(), pictures(2, 3)
    assert isinstance(model, LocalTokenizer) and isinstance(model, Tokenizer)
    tokens = call("encode", images)
    assert tokens.shape == (2, 3, GRID**2, K) and tokens.dtype == jnp.int32
    assert BLANK < tokens.min() and tokens.max() < VOCAB and len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(call("encode", images[1, 2]), tokens[1, 2])
    assert call("codes", tokens).shape == (2, 3, GRID**2, 6)
    decoded = call("decode", tokens)
    assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1


@pytest.mark.parametrize("place", [(2, 2), (0, 0), (4, 1)])
def test_a_patch_reaches_its_neighbours_only(place):
    """Vectors before the quantizer, where nothing hides a change, for a patch painted grey."""
    images = pictures(1)
    painted = images.copy()
    painted[patch_of(*place)] = 0.5
    features = grid_of(call("_features", images)), grid_of(call("_features", painted))
    moved = np.any(features[0] != features[1], axis=-1)[0]
    near = np.abs(np.arange(GRID) - place[0])[:, None] <= 1
    near = near & (np.abs(np.arange(GRID) - place[1]) <= 1)
    np.testing.assert_array_equal(moved, near)
    differ = np.any(grid_of(call("encode", images)) != grid_of(call("encode", painted)), axis=-1)[0]
    assert not np.any(differ & ~near)


def test_margin_is_half_a_patch():
    """4 pixels before a patch of 8 and 3 behind it, and no farther; below and above alike."""
    images = pictures(1)

    def sees(row):
        """Whether the patch at (2, 2), in rows 16 to 23, sees the picture's row."""
        changed = images.copy()
        changed[:, row] = 1 - changed[:, row]
        features = grid_of(call("_features", images)), grid_of(call("_features", changed))
        return bool(np.any(features[0][0, 2, 2] != features[1][0, 2, 2]))

    assert [sees(row) for row in (11, 12, 16, 23, 26, 27)] == [False, True, True, True, True, False]


def test_codes_move_with_the_picture():
    """There are no positions: what is outside the picture is as white as a blank patch."""
    images = objects(1)
    shifted = np.roll(images, (PATCH, -PATCH), axis=(1, 2))
    tokens, moved = grid_of(call("encode", images)), grid_of(call("encode", shifted))
    assert len(np.unique(tokens)) > 3
    np.testing.assert_array_equal(np.roll(tokens, (1, -1), axis=(1, 2)), moved)


def test_blank_patches_share_a_token_and_a_code():
    """Whatever lies beside them, whatever the weights: none is blank but by its own pixels."""
    images = objects(2)
    images[0][patch_of(0, 0)] = 1 - 0.9 * HALF_STEP
    images[1][patch_of(0, 0)][3, 3] = 1 - 1 / 255  # one pixel, one step of 8 bits
    tokens = grid_of(call("encode", images))
    is_blank = np.all(tokens == BLANK, axis=-1)
    expected = np.ones((2, GRID, GRID), bool)
    expected[:, 1:-1, 1:-1] = False
    expected[1, 0, 0] = False
    np.testing.assert_array_equal(is_blank, expected)
    assert not np.any(tokens[~expected] == BLANK)
    codes = grid_of(call("codes", jnp.asarray(tokens.reshape(2, -1, K))))[expected]
    np.testing.assert_array_equal(codes, np.broadcast_to(codes[0], codes.shape))
    white = call("decode", jnp.full((1, GRID**2, K), BLANK))
    np.testing.assert_array_equal(white, np.ones((1, SIZE, SIZE, 3)))


def test_blank_patches_are_out_of_statistics_and_loss():
    model, images = fresh(), objects(2)
    output = call("__call__", images)
    counted = np.bincount(np.asarray(output.tokens)[..., 0].ravel(), minlength=VOCAB)
    counted[BLANK] = 0
    np.testing.assert_allclose(output.stats.usage[0], 0.01 * counted / (2 * 9), rtol=1e-5)

    def of_object(images):
        return call("__call__", images).quantizer_loss

    # More white around the same objects is no change of the mean over object patches.
    more = np.concatenate([images, np.ones_like(images)])
    np.testing.assert_allclose(of_object(more), of_object(images), rtol=1e-5)
    assert of_object(np.ones_like(images)) == 0
    grads = jax.jit(jax.grad(lambda m, x: m(x).quantizer_loss, allow_int=True))(model, images)
    books = np.abs(np.asarray(grads.quantizer.codebooks[...])).sum(axis=-1)
    assert np.all(books[:, BLANK] == 0) and np.any(books > 0)


def test_repair_draws_from_object_patches():
    model, images = fresh(), objects(2)
    pool = np.asarray(model.quantizer.chunks(call("_features", images)))
    pool = pool.reshape(-1, *pool.shape[-2:])
    from_object = ~np.asarray(call("blank", images)).reshape(-1)
    repair = jax.jit(lambda m, x, key: m.repair(x, key, max_idle_steps=0))
    repaired, count = repair(model, images, jax.random.key(1))
    before, after = np.asarray(model.codebooks()), np.asarray(repaired.codebooks())
    assert count == K * (VOCAB - 1)
    np.testing.assert_array_equal(after[:, BLANK], before[:, BLANK])
    for k in range(K):
        distance = np.abs(after[k, BLANK + 1 :, None] - pool[None, :, k]).max(axis=-1)
        assert np.all(distance[:, from_object].min(axis=1) < 1e-6)
        assert len(set(distance.argmin(axis=1))) > 1
    same, count = repair(model, np.ones_like(images), jax.random.key(1))
    assert count == 0
    np.testing.assert_allclose(same.codebooks(), before, atol=1e-6)


def test_a_few_steps_lower_the_loss():
    """And the blank code keeps its direction, under weight decay too."""
    model, images = fresh(), jnp.asarray(objects(4))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = optax.adamw(3e-3, weight_decay=0.02)

    @jax.jit
    def step(params, opt_state):
        def loss(params):
            return tokenizer_loss(nnx.merge(graphdef, params, rest)(images), images)[0]

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    opt_state, losses = tx.init(params), []
    for _ in range(30):
        params, opt_state, value = step(params, opt_state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    trained = nnx.merge(graphdef, params, rest).codebooks()
    np.testing.assert_allclose(trained[:, BLANK], model.codebooks()[:, BLANK], atol=1e-6)
    assert np.abs(trained - model.codebooks()).max() > 1e-3


def test_bundle_keeps_it(tmp_path):
    model, images = fresh(), objects(2)
    bundle.save_stage(tmp_path, "tokenizer", model, {"stage": "tokenizer", "model": MODEL})
    loaded = bundle.read(tmp_path).load("tokenizer")
    assert isinstance(loaded, LocalTokenizer) and loaded.spec == model.spec
    assert loaded.spec.name == "local" and loaded.spec.num_tokens == GRID**2
    tokens = call("encode", images)
    np.testing.assert_array_equal(call("encode", images, model=loaded), tokens)
    np.testing.assert_array_equal(call("decode", tokens, model=loaded), call("decode", tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 36}, "resolution=36 must be a multiple of 8"),
        ({"tail_channels": [7]}, "must be as many as stem_channels"),
        ({"vocab_size": 1}, "vocab_size=1 must be at least 2"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        nn.build(tokenizer.make, jax.random.key(0), **{**MODEL, **changes})


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="reads 40 squared"):
        fresh().encode(jnp.ones((1, 16, 16, 3)))


def test_steadiness_counts_by_hand():
    """Three timesteps of one view, whose 25 patches are white but one, which changes once."""
    images = np.ones((1, 3, 1, SIZE, SIZE, 3), np.float32)
    images[patch_of(2, 2)] = 0.25
    images[:, 2][patch_of(2, 2)] = 0.5
    tokens = np.full((1, 3, 1, GRID**2, K), BLANK, np.int32)
    tokens[..., 12, :] = 4
    tokens[:, 1, :, 12, 0] = 5  # unchanged from the first timestep, but another token
    tokens[:, 1, :, 3, 1] = 1  # blank without the blank token: two unchanged patches not kept

    def shares_of(tokens, images):
        counts = steadiness_counts(jnp.asarray(tokens), jnp.asarray(images))
        return steadiness({name: float(x) for name, x in counts.items()})

    shares = shares_of(tokens, images)
    assert shares == pytest.approx(
        {
            "blank_share": 72 / 75,
            "blank_with_blank_token": 71 / 72,
            "unchanged_kept": 46 / 49,
            "unchanged_object_kept": 0.0,
        }
    )
    assert set(shares_of(tokens[:, :1], images[:, :1])) == {"blank_share", "blank_with_blank_token"}


def test_use_of_the_codebooks():
    tokens = jnp.array([[0, 1], [0, 2], [3, 2], [3, 2]])
    counts = code_counts(tokens, 5) + code_counts(tokens, 5)
    np.testing.assert_array_equal(counts, [[4, 0, 0, 4, 0], [0, 2, 6, 0, 0]])
    used = code_use(counts)
    assert used["codes_used"] == 4 / 10
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(used["codes_perplexity"], (2 + np.exp(entropy)) / 2)
    assert code_use(counts, has_blank=True)["codes_used"] == 3 / 8
