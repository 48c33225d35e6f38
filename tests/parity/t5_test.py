"""Our T5 encoder on what transformers' gave for a small one (tests/parity/t5.py --small)."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fourdstar_jax.convert import rules, torch_file
from fourdstar_jax.convert import t5 as convert

HERE = Path(__file__).parent
FIXTURE = HERE / "fixtures" / "t5"


BLOCKS = ["tokens", "mask", "buckets", "position_bias", "embed", "final_norm", "end_to_end"]
BLOCKS += [f"block{i}{part}" for i in (0, 1) for part in ("", "/attention", "/feed_forward")]


def test_no_block_is_left_out(rows):
    assert set(rows) == set(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_the_originals(rows, block):
    row = rows[block]
    assert row.limit <= (5e-5 if block == "end_to_end" else 1e-5)
    assert row.relative_l2 <= row.limit


def test_distances_up_to_200_are_compared(parity):
    saved = safetensors.numpy.load_file(FIXTURE / "activations.safetensors")
    assert parity.DISTANCES.min() == -200 and parity.DISTANCES.max() == 200
    assert saved["buckets"].shape == (401,) and len(set(saved["buckets"].tolist())) == 31
    mask = saved["mask"].astype(bool)
    assert mask.any(axis=1).all() and not mask.all()  # some captions are padded


def without_aliases():
    tree = torch_file.read(FIXTURE / "weights.bin")
    return {name: x for name, x in tree.items() if "embed_tokens" not in name}


def test_a_wrong_weight_is_noticed(parity, tmp_path):
    """The comparison fails for q and k exchanged, as it must."""
    state = without_aliases()
    q, k = (f"encoder.block.1.layer.0.SelfAttention.{x}.weight" for x in "qk")
    state[q], state[k] = state[k], state[q]
    safetensors.numpy.save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "activations.safetensors").write_bytes(
        (FIXTURE / "activations.safetensors").read_bytes()
    )
    wrong = {r.block: r for r in parity.compare(tmp_path) if r.relative_l2 > r.limit}
    assert set(wrong) == {"block1", "block1/attention", "end_to_end"}


def test_conversion_and_back_are_exact_and_sizes_are_found():
    state = convert.find(without_aliases())
    arguments = convert.arguments(state)
    sizes = dict(vocab_size=211, dim=64, num_layers=2, num_heads=4, head_dim=16, hidden_dim=128)
    assert arguments == sizes | {"num_buckets": 32}
    shapes = {
        "table": (211, 64),
        "distance_bias": (32, 4),
        "norm/scale": (64,),
        **{f"layers/{n}/kernel": (2, 64, 64) for n in ("q", "k", "v", "out")},
        **{f"layers/{n}/kernel": (2, 64, 128) for n in ("gate", "up")},
        "layers/down/kernel": (2, 128, 64),
        **{f"layers/{n}_norm/scale": (2, 64) for n in ("attention", "ffn")},
    }
    ours = convert.rules_for(shapes)
    assert rules.check(state, rules.their_shapes(ours, shapes), convert.IGNORED) == []
    arrays = rules.forward(ours, state)
    assert {name: x.shape for name, x in arrays.items()} == shapes
    back = rules.backward(ours, arrays)
    assert set(back) == set(state)
    for name, array in back.items():
        np.testing.assert_array_equal(array, state[name])


def test_the_file_of_torch_holds_the_table_under_three_names():
    tree = torch_file.read(FIXTURE / "weights.bin")
    aliases = {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    assert set(tree) == set(without_aliases()) | aliases
    for name in aliases:
        np.testing.assert_array_equal(tree[name], tree["shared.weight"])
        assert np.shares_memory(tree[name], tree["shared.weight"])


def test_aliases_and_the_decoder_are_ignored_and_others_are_named():
    state = without_aliases()
    table = state["shared.weight"]
    more = {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table}
    more |= {"lm_head.weight": table, "decoder.block.0.layer.0.layer_norm.weight": table[0]}
    names = {"table": table.shape}
    wanted = {name: x.shape for name, x in state.items()}
    assert rules.check(convert.find(state | more), wanted, convert.IGNORED) == []
    lines = rules.check(state | {"encoder.extra": table}, wanted, convert.IGNORED)
    assert len(lines) == 1 and "encoder.extra" in lines[0]
    # the encoder's own name of the table alone
    only = {n: x for n, x in state.items() if n != "shared.weight"}
    found = convert.find(only | {"encoder.embed_tokens.weight": table})
    np.testing.assert_array_equal(found[convert.rules_for(names)[0].theirs[0]], table)
    with pytest.raises(ValueError, match="shared.weight"):
        convert.find(only)
    plain = {n.replace("wi_0", "wi"): x for n, x in state.items() if "wi_1" not in n}
    with pytest.raises(ValueError, match=r"v1\.1.*wi_1"):
        convert.arguments(plain)
