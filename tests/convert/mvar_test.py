"""The key map of MVAR's two models: exact both ways, sizes from shapes, wrong files named.

See llamagen_test.py for the names and shapes of the released models.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax import bundle
from fourdstar_jax.convert import command, llamagen, mvar, rules

FIXTURE = Path(__file__).parent / "fixtures" / "trunks_xl.json"
NUM_LAYERS = 36
XL = dict(
    family="mvar", dim=1280, num_layers=36, num_heads=20, num_kv_heads=20, hidden_dim=3584,
    text_length=120, text_dim=2048, vocab_size=16384, patch=16,
)  # fmt: skip
TEXT = dict(num_condition_layers=0)
IMAGE = dict(num_condition_layers=3, align_dim=768, align_hidden_dim=2560)
TINY = dict(
    dim=6, num_layers=3, num_heads=3, num_kv_heads=3, hidden_dim=7, text_length=2, text_dim=5,
    vocab_size=11, patch=2, num_condition_layers=3, align_dim=4, align_hidden_dim=9,
)  # fmt: skip


def released(kind):
    """A state dict of the released sizes that takes no memory."""
    found = {}
    for name, shape in json.loads(FIXTURE.read_text())[kind].items():
        for i in range(NUM_LAYERS if "#" in name else 1):
            found[name.replace("#", str(i))] = np.broadcast_to(np.zeros((), np.float32), shape)
    return found


@pytest.fixture(scope="module")
def tiny():
    """Our shapes and their random state dict at tiny sizes."""
    shapes = mvar.shapes(TINY)
    wanted = rules.their_shapes(mvar.rules_for(shapes), shapes)
    rng = np.random.default_rng(0)
    return shapes, {name: rng.normal(size=shape) for name, shape in wanted.items()}


@pytest.mark.parametrize(
    "kind, more, arrays, numbers",
    [("text", TEXT, 332, 1_134_063_360), ("image", IMAGE, 354, 1_190_768_640)],
)
def test_the_released_state_dicts_have_all_that_is_asked_for(kind, more, arrays, numbers):
    state = released(f"mvar_{kind}_xl")
    assert len(state) == arrays and sum(x.size for x in state.values()) == numbers
    assert mvar.arguments(state) == XL | more
    shapes = mvar.shapes(XL | more)
    wanted = rules.their_shapes(mvar.rules_for(shapes), shapes)
    assert rules.check(state, wanted, mvar.IGNORED) == []
    assert wanted == {name: x.shape for name, x in state.items()}


def test_there_and_back_is_exact(tiny):
    shapes, state = tiny
    table = mvar.rules_for(shapes)
    assert rules.check(state, rules.their_shapes(table, shapes), mvar.IGNORED) == []
    arrays = rules.forward(table, state)
    assert {name: x.shape for name, x in arrays.items()} == shapes
    back = rules.backward(table, arrays)
    assert set(back) == set(state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_arrays_go_where_their_names_say(tiny):
    shapes, state = tiny
    arrays = rules.forward(mvar.rules_for(shapes), state)
    rays = state["cam_patchify.proj.weight"]  # [D, 6, 2, 2]
    np.testing.assert_array_equal(arrays["cam_patchify/proj/kernel"][1, 0, 5], rays[:, 5, 1, 0])
    ada = state["layers.1.ada_linear.weight"]
    np.testing.assert_array_equal(arrays["layers/1/ada_linear/kernel"], ada.T)
    down = state["layers.2.feed_forward.w2.weight"]
    np.testing.assert_array_equal(arrays["layers/2/ffn/down/kernel"], down.T)
    fused = state["layers.2.attention.wqkv.weight"]
    np.testing.assert_array_equal(arrays["layers/2/k/kernel"], fused[6:12].T)
    fc1 = state["cls_embedding.cap_proj.fc1.weight"]
    np.testing.assert_array_equal(arrays["text/mlp/up/kernel"], fc1.T)


def test_names_and_shapes_that_are_wrong_are_told(tiny):
    shapes, state = tiny
    wanted = rules.their_shapes(mvar.rules_for(shapes), shapes)
    other = {name: x for name, x in state.items() if name != "image_warp.ada_linear.bias"}
    other |= {"lora.weight": np.ones(2), "cam_patchify.proj.bias": np.ones(5)}
    assert rules.check(other, wanted, mvar.IGNORED) == [
        "missing: image_warp.ada_linear.bias (54,)",
        "not known: lora.weight (2,)",
        "of another shape: cam_patchify.proj.bias is (5,), not (6,)",
    ]


def test_names_lose_their_first_word():
    tree = {"model": {"module.norm.weight": np.ones(2), "module.layers.0.x": np.ones(3)}}
    assert sorted(mvar.find(tree)) == ["layers.0.x", "norm.weight"]
    with pytest.raises(ValueError, match="steps"):
        mvar.find({"steps": 3})


def test_other_state_dicts_are_refused():
    state = released("llamagen_t2i_xl")
    with pytest.raises(ValueError, match=r"not the state dict of an MVAR.*cam_patchify"):
        mvar.arguments(state)


def test_a_file_becomes_a_bundle_and_comes_back(tmp_path, monkeypatch, tiny):
    monkeypatch.setitem(llamagen.NUM_HEADS, 6, 3)
    _, state = tiny
    state = {name: x.astype(np.float32) for name, x in state.items()}
    safetensors.numpy.save_file(
        {f"module.{name}": x for name, x in state.items()}, tmp_path / "given.safetensors"
    )
    info = command.convert("mvar", tmp_path / "given.safetensors", tmp_path / "bundle")
    assert info["tensors"] == len(state) and info["not_needed"] == 0
    arguments = bundle.read(tmp_path / "bundle").stages["trunk"].model
    assert arguments == TINY | {"family": "mvar", "dtype": "float32"}
    command.reverse("mvar", tmp_path / "bundle", tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert set(back) == set(state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
