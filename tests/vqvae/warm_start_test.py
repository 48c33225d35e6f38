"""A decoder that starts as UniTok's: the same features for the same codes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import geometry, nn
from fourdstar_jax.nn.vit import run_blocks
from fourdstar_jax.tokenizer.unitok import UniTok
from fourdstar_jax.vqvae import warm_start
from fourdstar_jax.vqvae.model import VQVAE4D

SIZES = dict(dim=12, num_heads=3, hidden_dim=14)
UNITOK = dict(
    resolution=32, stem="hybrid", stem_channels=(4, 4, 6), stem_depths=(1, 1), num_blocks=1,
    num_decoder_blocks=11, tail="hybrid", tail_channels=(6, 6, 4), tail_depths=(2, 1),
    num_codebooks=2, vocab_size=5, code_dim=6, learned_positions=False, **SIZES,
)  # fmt: skip
MODEL = dict(
    resolution=32, grid=2, code_dim=6, num_blocks=11, view_attention_every=4, up="hybrid",
    up_channels=(6, 6, 4), up_depths=(2, 1), offset_dim=8, offset_layers=1, offset_heads=2,
    unet_channels=(4, 8), unet_blocks=1, **SIZES,
)  # fmt: skip


def arbitrary(make, arguments, seed=0):
    """Weights of order one: with small ones blocks do little."""
    build = functools.partial(nn.build, make, **arguments)
    model = nn.host_weights(jax.eval_shape(build, jax.random.key(0)), seed)
    return jax.tree.map(lambda x: 10 * x if x.dtype == jnp.float32 and x.ndim > 1 else x, model)


@functools.cache
def unitok():
    return arbitrary(UniTok, UNITOK)


def arrays_of(model):
    return {name: np.asarray(x) for name, x in nn.named_arrays(model).items()}


def test_features_are_those_of_the_tokenizers_decoder():
    tokenizer = unitok()
    model, report = warm_start.load(arbitrary(VQVAE4D, MODEL, 1), arrays_of(tokenizer), UNITOK)
    codes = tokenizer.codes(jax.random.randint(jax.random.key(0), (1, 2, 3, 4, 2), 0, 5))
    cameras = geometry.orbit_cameras([0, 80, 200], width=32, height=32)
    cameras = jax.tree.map(lambda x: x[None], cameras)

    @jax.jit
    def theirs(tokenizer, head_norm, codes):
        x = tokenizer.post_quant_proj(codes.reshape(6, 4, 6))
        x = run_blocks(tokenizer.decoder.blocks, tokenizer.decoder.norm, x)
        return nnx.silu(head_norm(tokenizer.decoder.tail.up(x.reshape(6, 2, 2, -1))))

    wanted = theirs(tokenizer, model.static.head_norm, codes)
    found = jax.jit(lambda m, *args: m(*args).features)(model.static, codes, cameras)
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(found[0].reshape(wanted.shape), wanted, atol=1e-4)

    assert len(report.loaded) == sum(
        name.startswith(("post_quant_proj", "decoder/blocks", "decoder/norm", "decoder/tail/up"))
        for name in arrays_of(tokenizer)
    )
    assert set(report.loaded) | set(report.skipped) == set(arrays_of(tokenizer))
    text = "\n".join(report.lines())
    assert "static/rays (1), static/view_attentions (1)" in text
    assert "decoder/tail (6)" in text and "offsets/unet" in text


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_heads=2), "has 3 heads, and the model 2"),
        (
            dict(num_blocks=10),
            r"bias is \(11, 12\) in the tokenizer's decoder, and \(10, 12\) in the",
        ),
        (dict(up_depths=(1, 1)), "only the tokenizer's decoder has up/stages/0/1/"),
        (dict(up_depths=(2, 2)), "only the model has up/stages/1/1/"),
    ],
)
def test_other_sizes_are_named(changes, words):
    model = arbitrary(VQVAE4D, MODEL | changes)
    with pytest.raises(ValueError, match=words):
        warm_start.load(model, arrays_of(unitok()), UNITOK)


def test_a_tokenizer_without_such_a_decoder_is_named():
    model = arbitrary(VQVAE4D, MODEL)
    with pytest.raises(ValueError, match="no decoder of UniTok's kind"):
        warm_start.load(model, {"encoder/conv/kernel": np.zeros(3)}, {})
    places = arrays_of(unitok()) | {"decoder/pos_embed": np.zeros((4, 12))}
    with pytest.raises(ValueError, match="learned positions"):
        warm_start.load(model, places, UNITOK)
