"""Our UniTok on what the original's code gave for a small one (tests/parity/unitok.py --small)."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

HERE = Path(__file__).parent
FIXTURE = HERE / "fixtures" / "unitok"

BACKBONE = "encoder.patch_embed.backbone"
BLOCKS = [f"{BACKBONE}.stem", *(f"{BACKBONE}.stages.{i}" for i in ("0.0", "1.0", "1.1"))]
BLOCKS += [f"{BACKBONE}.pool", "encoder.blocks.0", "encoder.norm", "quant_proj", "quantizer"]
BLOCKS += ["post_quant_proj", "decoder.blocks.0", "decoder.norm", "decoder.up_conv1"]
BLOCKS += ["decoder.up_conv2.0", "decoder.up_conv2.1", "decoder.up_conv3.0", "decoder.up_conv4"]
WHOLE = ["encoder", "decoder", "images to tokens to images"]
TOKENS = ["quantizer: wrong tokens", "images to tokens: wrong tokens"]


def test_no_block_is_left_out(rows):
    assert set(rows) == {*BLOCKS, *WHOLE, *TOKENS}


@pytest.mark.parametrize("block", BLOCKS + WHOLE + TOKENS)
def test_every_block_is_the_originals(rows, block):
    row = rows[block]
    assert row.limit <= (1e-5 if block in BLOCKS else 5e-5 if block in WHOLE else 0)
    assert row.relative_l2 <= row.limit


def test_the_original_chose_many_codes_and_none_by_rounding():
    saved = safetensors.numpy.load_file(FIXTURE / "activations.safetensors")
    assert saved["tokens"].shape == (1, 16, 4) and len(np.unique(saved["tokens"])) > 16
    assert saved["margins"].min() > 1e-4


def test_exchanged_weights_are_noticed(parity, tmp_path, monkeypatch):
    (tmp_path / "activations.safetensors").write_bytes(
        (FIXTURE / "activations.safetensors").read_bytes()
    )
    load = parity.load

    def exchanged(kind, source, **changes):
        model = load(kind, FIXTURE / source.name, **changes)
        mlp = model.decoder.blocks[0].mlp
        mlp.w0, mlp.w1 = mlp.w1, mlp.w0
        return model

    monkeypatch.setattr(parity, "load", exchanged)
    wrong = {row.block for row in parity.compare(tmp_path) if row.relative_l2 > row.limit}
    assert wrong == {"decoder.blocks.0", "decoder", "images to tokens to images"}


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("FOURDSTAR_ORIGINALS"),
    reason="full-size parity of UniTok, VQ-16 and T5 not rerun: it needs PyTorch and the original "
    "sources, FOURDSTAR_ORIGINALS='PYTHON UNITOK LLAMAGEN'; tests/parity/tokenizers.md has the "
    "last figures",
)
def test_the_originals_at_full_size(tmp_path):
    python, unitok, llamagen = os.environ["FOURDSTAR_ORIGINALS"].split()
    command = [sys.executable, str(HERE / "run.py"), "--python", python, "--unitok", unitok]
    command += ["--llamagen", llamagen, "--out", str(tmp_path / "table.md")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
