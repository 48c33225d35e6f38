"""VQ16 behind the tokenizers' protocol and in bundles."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from fourdstar_jax import bundle, nn, sharding, tokenizer
from fourdstar_jax.tokenizer.unitok import UniTok
from fourdstar_jax.tokenizer.vq16 import VQ16, Downsample
from fourdstar_jax.train import tokenizer as trainer
from fourdstar_jax.types import TokenizerSpec

SIZE, GRID, VOCAB = 32, 8, 64
MODEL = dict(
    family="vq16", resolution=SIZE, channels=32, multipliers=[1, 2, 1], num_blocks=1, z_dim=5,
    vocab_size=VOCAB, code_dim=4,
)  # fmt: skip


def make(**changes):
    """A tokenizer with arbitrary weights, whose images have many different tokens."""
    rng = np.random.default_rng(0)

    def fill(shape):
        if np.issubdtype(shape.dtype, np.floating):
            return jnp.asarray(rng.normal(0, 0.3, shape.shape), shape.dtype)
        return jnp.zeros(shape.shape, shape.dtype)

    build = functools.partial(nn.build, tokenizer.make, **{**MODEL, **changes})
    return jax.tree.map(fill, jax.eval_shape(build, jax.random.key(0)))


@pytest.fixture(scope="module")
def model():
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return make()


@pytest.fixture
def folder(tmp_path, model):
    bundle.save_stage(tmp_path / "b", "tokenizer", model, {"stage": "tokenizer", "model": MODEL})
    return tmp_path / "b"


def pictures(*leading, seed=0):
    return jax.random.uniform(jax.random.key(seed), (*leading, SIZE, SIZE, 3))


def test_protocol(model):
    """Leading axes are free; tokens are row-major, one a token; images stay in range."""
    images = pictures(2, 3)
    tokens = model.encode(images)
    assert tokens.shape == (2, 3, GRID**2, 1) and tokens.dtype == jnp.int32
    assert len(np.unique(tokens)) > 16 and 0 <= tokens.min() and tokens.max() < VOCAB
    np.testing.assert_array_equal(model.encode(images[1, 2]), tokens[1, 2])
    codes = model.codes(tokens)
    assert codes.shape == (2, 3, GRID**2, 4)
    np.testing.assert_array_equal(codes, model.codebooks()[0][tokens[..., 0]])
    np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-6)
    decoded = model.decode(tokens)
    assert decoded.shape == images.shape
    assert 0 <= decoded.min() and decoded.max() <= 1 and np.std(decoded) > 0.05
    np.testing.assert_allclose(model.decode(tokens[1, 2]), decoded[1, 2], atol=1e-5)


def test_spec(model):
    spec = model.spec
    assert dataclasses.replace(spec, weights_sha256="") == TokenizerSpec(
        name="vq16", resolution=SIZE, num_tokens=GRID**2, num_codebooks=1, vocab_size=VOCAB,
        code_dim=4, weights_sha256="",
    )  # fmt: skip


def test_tokens_are_nearest_by_euclidean_distance(model):
    """The definition in the paper and in LlamaGen, in float64."""
    images = pictures(3)
    z = np.asarray(model._features(2 * images - 1), np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    book = np.asarray(model.quantizer.codebooks[...][0], np.float64)
    book /= np.linalg.norm(book, axis=-1, keepdims=True)
    distances = np.sum((z[:, :, None] - book) ** 2, axis=-1)
    two = np.sort(distances, axis=-1)[..., :2]
    clear = two[..., 1] - two[..., 0] > 1e-5
    assert clear.mean() > 0.9
    nearest = np.argmin(distances, axis=-1)
    np.testing.assert_array_equal(np.asarray(model.encode(images))[..., 0][clear], nearest[clear])


def test_downsampling_pads_right_and_bottom():
    layer = nn.build(Downsample, jax.random.key(0), dim=1)
    kernel = jnp.zeros((3, 3, 1, 1)).at[0, 0].set(1.0)  # reads the top left of its window
    layer = jax.tree.map(lambda x: kernel if x.ndim == 4 else jnp.zeros_like(x), layer)
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(layer(x)[0, :, :, 0], [[0, 2], [8, 10]])


def test_bfloat16_leaves_the_quantizer_alone(model):
    half = make(dtype=jnp.bfloat16)
    images = pictures(2)
    features = half._features(images)
    assert features.dtype == half.codebooks().dtype == jnp.float32
    assert half._images(half.codes(half.encode(images))).dtype == jnp.float32
    a, b = np.asarray(features), np.asarray(model._features(images))
    assert 1e-4 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 34}, "resolution=34 must be a multiple of 4"),
        ({"channels": 40}, "channels=40 must be a multiple of 32"),
        ({"family": "vq8"}, "'vq8' must be one of unitok, vq16, local"),
    ],
)
def test_wrong_sizes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="reads 32 squared"):
        model.encode(jnp.zeros((1, 16, 16, 3)))


def test_bundle_keeps_the_family(folder, model):
    loaded = bundle.read(folder).load("tokenizer")
    assert isinstance(loaded, VQ16) and bundle.read(folder).spec == model.spec
    images = pictures(2)
    np.testing.assert_array_equal(loaded.encode(images), model.encode(images))


def test_bundle_without_a_family_is_unitok(tiny_bundle):
    assert "family" not in bundle.read(tiny_bundle).stages["tokenizer"].model
    assert isinstance(bundle.read(tiny_bundle).load("tokenizer"), UniTok)


def test_training_it_says_that_it_cannot(tmp_path):
    config = ConfigDict({"seed": 0, "model": MODEL})
    with pytest.raises(NotImplementedError, match="'vq16'.*converted into a bundle"):
        trainer.train(config, tmp_path)
    assert not list(tmp_path.iterdir())
