"""The training steps' benchmark at tiny size."""

import json

import jax
import pytest

from fourdstar_jax import cli


def test_vqvae(tmp_path, capsys):
    file = tmp_path / "new" / "results.json"
    flags = [
        "--parts",
        "discriminator",
        "data",
        "--repeats",
        "1",
        "--views",
        "3",
        "--commit",
        "abc",
    ]
    changes = ["--config.data.timesteps=2", "--config.model.num_blocks=1"]
    changes += ["--config.loss.coarse_weight=(0.0,0.0,1.0)"]  # one render less to compile
    changes += ["--config.adversarial.weight=0.1", "--config.adversarial.multiplier=0.01"]
    changes += ["--config.adversarial.r1_weight=0.0", "--config.render.num_timesteps=1"]
    assert cli.main(["bench", "train", "vqvae", *flags, *changes, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert "tiny, 1 objects, 2 timesteps, 3 views" in out and "compiled in" in out
    results = json.loads(file.read_text())
    assert results["commit"] == "abc" and results["device"] == jax.devices()[0].device_kind
    assert results["model"]["num_blocks"] == 1 and results["parameters"] > 500_000
    step = results["step"]
    assert step["step_s"] > 0 and step["compile_s"] > 0 and not step["overflow"]
    assert step["temporary_bytes"] < step["program_bytes"] and step["pairs"] > 0
    assert step["tflops"] == pytest.approx(results["tflop"] / step["step_s"])
    # a block, the rest of the decoder, both ways, on 2 x 3 pictures of 16 tokens
    block = 16 * 64 * (4 * 64 + 3 * 128 + 2 * 16)
    assert 1 < 1e12 * results["tflop"] / (3 * 2 * 6 * block) < 60
    assert list(results["parts"]) == ["discriminator", "data"]
    for part in results["parts"].values():
        assert part["share"] == pytest.approx(part["ms"] / 1e3 / step["step_s"])
