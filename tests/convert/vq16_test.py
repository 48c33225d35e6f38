"""The key map of LlamaGen's VQ: exact both ways, sizes from shapes, wrong files named."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax import nn, tokenizer
from fourdstar_jax.convert import rules, vq16

WEIGHTS = Path(__file__).parents[1] / "parity" / "fixtures" / "vq16" / "weights.safetensors"
# VQ-16 as released, in the order of `VQ16`'s arguments.
RELEASED = dict(
    family="vq16", resolution=256, channels=128, multipliers=[1, 1, 2, 2, 4], num_blocks=2,
    z_dim=256, vocab_size=16384, code_dim=8,
)  # fmt: skip


def shapes_of(arguments):
    def make(key):
        return nn.build(tokenizer.make, key, **arguments)

    return {n: x.shape for n, x in nn.named_arrays(jax.eval_shape(make, jax.random.key(0))).items()}


@pytest.fixture(scope="module")
def state():
    return safetensors.numpy.load_file(WEIGHTS)


def test_sizes_are_those_of_the_shapes(state):
    assert vq16.arguments(state) == dict(
        family="vq16", resolution=256, channels=32, multipliers=[2, 1], num_blocks=1, z_dim=16,
        vocab_size=64, code_dim=8,
    )  # fmt: skip


def test_there_and_back_is_exact(state):
    shapes = shapes_of(vq16.arguments(state))
    table = vq16.rules_for(shapes)
    assert rules.check(state, rules.their_shapes(table, shapes), vq16.IGNORED) == []
    arrays = rules.forward(table, state)
    assert {name: x.shape for name, x in arrays.items()} == shapes
    assert not arrays["quantizer/usage"].any() and not arrays["quantizer/idle_steps"].any()
    back = rules.backward(table, arrays)
    assert set(back) == set(state) - {"quantize.codebook_used"}
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_the_released_state_dict_has_all_that_is_asked_for():
    """344 names with `codebook_used`, which is not needed; 71,883,403 numbers."""
    shapes = shapes_of(RELEASED)
    wanted = rules.their_shapes(vq16.rules_for(shapes), shapes)
    assert len(wanted) == 343
    assert sum(int(np.prod(shape)) for shape in wanted.values()) == 71_883_403
    assert wanted["encoder.conv_blocks.4.res.0.nin_shortcut.weight"] == (512, 256, 1, 1)
    assert wanted["decoder.conv_blocks.0.attn.2.q.weight"] == (512, 512, 1, 1)
    assert wanted["decoder.conv_blocks.3.upsample.conv.weight"] == (128, 128, 3, 3)
    nothing = np.zeros((), np.float32)
    state = {name: np.broadcast_to(nothing, shape) for name, shape in wanted.items()}
    assert vq16.arguments(state) == RELEASED


def test_names_too_many_and_too_few_are_told(state):
    shapes = shapes_of(vq16.arguments(state))
    wanted = rules.their_shapes(vq16.rules_for(shapes), shapes)
    other = {n: x for n, x in state.items() if n != "encoder.mid.1.q.bias"} | {"loss.x": np.ones(2)}
    lines = rules.check(other, wanted, vq16.IGNORED)
    assert len(lines) == 2 and "encoder.mid.1.q.bias" in lines[0] and "loss.x" in lines[1]


def test_averaged_weights_are_preferred():
    trees = {name: {name: np.ones(1)} for name in ("ema", "model", "state_dict")}
    for expected in ("ema", "model", "state_dict"):
        assert set(vq16.find({"steps": 3, **trees})) == {expected}
        del trees[expected]
    with pytest.raises(ValueError, match="steps"):
        vq16.find({"steps": 3})


def test_other_state_dicts_are_refused(state):
    with pytest.raises(ValueError, match="not the state dict of LlamaGen's VQ"):
        vq16.arguments({"encoder.weight": np.ones((2, 3))})
    name = "decoder.conv_blocks.0.res.0.conv1.weight"
    with pytest.raises(ValueError, match=r"\[64, 32\].*\[64, 96\]"):
        vq16.arguments({**state, name: np.zeros((96, 32, 3, 3), np.float16)})
