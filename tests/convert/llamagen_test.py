"""The key map of LlamaGen's models: exact both ways, sizes from shapes, wrong files named.

`fixtures/trunks_xl.json` holds names and shapes of the XL models' state dicts, built by LlamaGen's
and MVAR's own code without memory; "#" stands for each of the 36 layers.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax import bundle
from fourdstar_jax.convert import command, llamagen, rules

FIXTURE = Path(__file__).parent / "fixtures" / "trunks_xl.json"
NUM_LAYERS = 36
TINY = dict(
    dim=6, num_layers=3, num_heads=3, num_kv_heads=3, hidden_dim=7, text_length=2, text_dim=5,
    vocab_size=11,
)  # fmt: skip


def released(kind):
    """A state dict of the released sizes that takes no memory."""
    found = {}
    for name, shape in json.loads(FIXTURE.read_text())[kind].items():
        for i in range(NUM_LAYERS if "#" in name else 1):
            found[name.replace("#", str(i))] = np.broadcast_to(np.zeros((), np.float32), shape)
    return found


def tiny(arguments):
    """Our shapes and their random state dict at tiny sizes."""
    shapes = llamagen.shapes(arguments)
    wanted = rules.their_shapes(llamagen.rules_for(shapes), shapes)
    rng = np.random.default_rng(0)
    return shapes, {name: rng.normal(size=shape) for name, shape in wanted.items()}


def test_the_released_state_dict_has_all_that_is_asked_for():
    """258 arrays, 777,923,840 numbers: the "775M" of LlamaGen's table and the buffer of no text."""
    state = released("llamagen_t2i_xl")
    assert len(state) == 258 and sum(x.size for x in state.values()) == 777_923_840
    arguments = llamagen.arguments(state)
    assert arguments == dict(
        family="llamagen", dim=1280, num_layers=36, num_heads=20, num_kv_heads=20,
        hidden_dim=3584, text_length=120, text_dim=2048, vocab_size=16384,
    )  # fmt: skip
    shapes = llamagen.shapes(arguments)
    wanted = rules.their_shapes(llamagen.rules_for(shapes), shapes)
    assert rules.check(state, wanted, llamagen.IGNORED) == []
    assert wanted == {name: x.shape for name, x in state.items()}


@pytest.mark.parametrize("changes", [{}, {"num_kv_heads": 1}, {"num_classes": 4}])
def test_there_and_back_is_exact(changes):
    shapes, state = tiny(TINY | changes)
    assert ("cls_embedding.embedding_table.weight" in state) == ("num_classes" in changes)
    table = llamagen.rules_for(shapes)
    assert rules.check(state, rules.their_shapes(table, shapes), llamagen.IGNORED) == []
    arrays = rules.forward(table, state)
    assert {name: x.shape for name, x in arrays.items()} == shapes
    back = rules.backward(table, arrays)
    assert set(back) == set(state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)


def test_arrays_go_where_their_names_say():
    """q, k, v one after the other in wqkv; w1 is what goes through the SiLU, w2 comes last."""
    shapes, state = tiny(TINY | {"num_kv_heads": 1})
    arrays = rules.forward(llamagen.rules_for(shapes), state)
    fused = state["layers.2.attention.wqkv.weight"]
    assert fused.shape == (6 + 2 + 2, 6)
    for part, rows in {"q": fused[:6], "k": fused[6:8], "v": fused[8:]}.items():
        np.testing.assert_array_equal(arrays[f"layers/2/{part}/kernel"], rows.T)
    for ours, theirs in {
        "layers/1/ffn/gate/kernel": "layers.1.feed_forward.w1.weight",
        "layers/1/ffn/up/kernel": "layers.1.feed_forward.w3.weight",
        "layers/1/ffn/down/kernel": "layers.1.feed_forward.w2.weight",
        "layers/1/out/kernel": "layers.1.attention.wo.weight",
        "text/mlp/up/kernel": "cls_embedding.cap_proj.fc1.weight",
        "text/mlp/down/kernel": "cls_embedding.cap_proj.fc2.weight",
        "output/kernel": "output.weight",
    }.items():
        np.testing.assert_array_equal(arrays[ours], state[theirs].T, err_msg=ours)
    for ours, theirs in {
        "tok_embeddings/embedding": "tok_embeddings.weight",
        "cls_embedding/uncond_embedding": "cls_embedding.uncond_embedding",
        "layers/0/ffn_norm/scale": "layers.0.ffn_norm.weight",
        "layers/0/attention_norm/scale": "layers.0.attention_norm.weight",
        "norm/scale": "norm.weight",
    }.items():
        np.testing.assert_array_equal(arrays[ours], state[theirs], err_msg=ours)


def test_names_and_shapes_that_are_wrong_are_told():
    shapes, state = tiny(TINY)
    wanted = rules.their_shapes(llamagen.rules_for(shapes), shapes)
    other = {name: x for name, x in state.items() if name != "layers.1.attention.wo.weight"}
    other |= {"freqs_cis": np.ones(2), "norm.weight": np.ones(5)}
    other["layers.0.attention.kv_cache.k_cache"] = np.ones(2)  # of sampling: not needed
    lines = rules.check(other, wanted, llamagen.IGNORED)
    assert lines == [
        "missing: layers.1.attention.wo.weight (6, 6)",
        "not known: freqs_cis (2,)",
        "of another shape: norm.weight is (5,), not (6,)",
    ]


def test_state_dicts_are_found_where_the_sampling_scripts_look():
    for key in ("model", "module", "state_dict"):
        assert llamagen.find({"steps": 3, key: {"x": np.ones(1)}}) == {"x": np.ones(1)}
    bare = {"tok_embeddings.weight": np.ones((2, 3))}
    found = llamagen.find(bare)
    assert list(found) == list(bare)
    assert found["tok_embeddings.weight"] is bare["tok_embeddings.weight"]
    with pytest.raises(ValueError, match="no model.*steps"):
        llamagen.find({"steps": 3})


def test_other_state_dicts_are_refused():
    with pytest.raises(ValueError, match=r"not the state dict of a LlamaGen.*norm\.weight"):
        llamagen.arguments({"encoder.weight": np.ones((2, 3))})
    with pytest.raises(ValueError, match="width 48"):
        llamagen.arguments({"norm.weight": np.ones(48)})


def test_models_of_classes_have_a_table_instead_of_a_text_mlp():
    state = released("llamagen_t2i_xl")
    state = {name: x for name, x in state.items() if not name.startswith("cls_embedding")}
    table = "cls_embedding.embedding_table.weight"
    state[table] = np.broadcast_to(np.zeros((), np.float32), (1001, 1280))
    arguments = llamagen.arguments(state)
    assert arguments["num_classes"] == 1001 and "text_dim" not in arguments
    shapes = llamagen.shapes(arguments)
    wanted = rules.their_shapes(llamagen.rules_for(shapes), shapes)
    assert rules.check(state, wanted, llamagen.IGNORED) == []


def test_a_file_becomes_a_bundle_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setitem(llamagen.NUM_HEADS, 6, 3)
    _, state = tiny(TINY)
    state = {name: x.astype(np.float32) for name, x in state.items()}
    safetensors.numpy.save_file(state, tmp_path / "given.safetensors")
    info = command.convert("llamagen", tmp_path / "given.safetensors", tmp_path / "bundle")
    assert info["tensors"] == len(state) and info["not_needed"] == 0
    arguments = bundle.read(tmp_path / "bundle").stages["trunk"].model
    assert arguments == TINY | {"family": "llamagen", "dtype": "float32"}
    command.reverse("llamagen", tmp_path / "bundle", tmp_path / "back.safetensors")
    back = safetensors.numpy.load_file(tmp_path / "back.safetensors")
    assert set(back) == set(state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
