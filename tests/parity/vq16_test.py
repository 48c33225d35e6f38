"""Our VQ-16 on what LlamaGen's code gave for a small one (tests/parity/vq16.py --small)."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

HERE = Path(__file__).parent
FIXTURE = HERE / "fixtures" / "vq16"

HALVES = {
    "encoder": ["conv_in", "conv_blocks.0.res.0", "conv_blocks.0.downsample"]
    + ["conv_blocks.1.res.0", "conv_blocks.1.attn.0", "mid.0", "mid.1", "mid.2", "conv_out"],
    "decoder": ["conv_in", "mid.0", "mid.1", "mid.2"]
    + [f"conv_blocks.0.{kind}.{i}" for i in (0, 1) for kind in ("res", "attn")]
    + ["conv_blocks.0.upsample", "conv_blocks.1.res.0", "conv_blocks.1.res.1", "conv_out"],
}
BLOCKS = [f"{half}.{name}" for half, names in HALVES.items() for name in names]
BLOCKS += ["quant_conv", "quantize", "post_quant_conv"]
WHOLE = ["encoder", "decoder", "images to tokens to images"]
TOKENS = ["quantize: wrong tokens", "images to tokens: wrong tokens"]


def test_no_block_is_left_out(rows):
    assert set(rows) == {*BLOCKS, *WHOLE, *TOKENS}


@pytest.mark.parametrize("block", BLOCKS + WHOLE + TOKENS)
def test_every_block_is_the_originals(rows, block):
    row = rows[block]
    assert row.limit <= (1e-5 if block in BLOCKS else 5e-5 if block in WHOLE else 0)
    assert row.relative_l2 <= row.limit


def test_the_original_chose_many_codes_and_none_by_rounding():
    saved = safetensors.numpy.load_file(FIXTURE / "activations.safetensors")
    assert saved["tokens"].shape == (2, 4, 4) and len(np.unique(saved["tokens"])) > 16
    assert saved["margins"].min() > 1e-3


def test_exchanged_weights_are_noticed(parity, tmp_path):
    state = safetensors.numpy.load_file(FIXTURE / "weights.safetensors")
    q, k = (f"decoder.mid.1.{x}.weight" for x in "qv")
    state[q], state[k] = state[k], state[q]
    safetensors.numpy.save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "activations.safetensors").write_bytes(
        (FIXTURE / "activations.safetensors").read_bytes()
    )
    wrong = {row.block for row in parity.compare(tmp_path) if row.relative_l2 > row.limit}
    assert wrong == {"decoder.mid.1", "decoder", "images to tokens to images"}
