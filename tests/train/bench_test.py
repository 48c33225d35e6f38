"""The training steps' benchmark at tiny size."""

import json

import jax
import pytest

from fourdstar_jax import cli


def test_vqvae(tmp_path, capsys):
    file = tmp_path / "new" / "results.json"
    flags = [
        "--parts",
        "views",
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
    assert list(results["parts"]) == ["views", "discriminator", "data"]
    for part in results["parts"].values():
        assert part["share"] == pytest.approx(part["ms"] / 1e3 / step["step_s"])


def test_star(tmp_path, capsys):
    file = tmp_path / "results.json"
    changes = ["--config.data.timesteps=3", "--config.model.num_layers=1"]
    changes += ["--config.forcing.num_groups=2", "--config.model.dim=64"]
    flags = ["--parts", "clustering", "--repeats", "1", "--views", "3", "--batch", "2"]
    flags += ["--devices", "2", "--commit", "abc", "--json", str(file)]
    assert cli.main(["bench", "train", "star", *flags, *changes]) == 0
    assert "tiny, 2 objects, 3 timesteps, 3 views" in capsys.readouterr().out
    results = json.loads(file.read_text())
    step = results["step"]
    assert step["tflops"] == pytest.approx(results["tflop"] / step["step_s"])
    assert step["tokens_per_s"] == pytest.approx(2 * 2 * 32 / step["step_s"])
    assert step["mfu"] is None and results["devices"] == 2  # no peak is known of a CPU
    assert list(results["parts"]) == ["clustering"]
    # 12 slots of text and 48 of the video; 2 groups of 16 clusters and 32 tokens
    attention = 60**2 + 2 * (48 * (60 + 16) + 32 * 33 // 2)
    want = 2 * 4 * 64 * attention / 1e12
    assert results["forward_tflop"]["attention"] == pytest.approx(want)
    matrices = 4 * 64**2 + 3 * 64 * 352
    want = 2 * 2 * matrices * (60 + 2 * 48) / 1e12
    assert results["forward_tflop"]["trunk"] == pytest.approx(want)
    assert cli.main(["bench", "train", "vqvae", "--devices", "2"]) == 2


def test_ablations_are_of_star():
    assert cli.main(["bench", "train", "vqvae", "--ablations"]) == 2
    assert cli.main(["bench", "train", "star", "--ablations", "--devices", "2"]) == 2


@pytest.mark.slow
def test_ablations_of_star_take_turns(tmp_path, capsys):
    file = tmp_path / "results.json"
    small = ["--config.data.timesteps=2", "--config.model.num_layers=1", "--config.model.dim=32"]
    small += ["--config.model.head_dim=16", "--config.model.container_slots=4"]
    flags = ["--ablations", "--repeats", "2", "--views", "2", "--json", str(file)]
    assert cli.main(["bench", "train", "star", *flags, *small]) == 0
    assert "ours  " in capsys.readouterr().out
    results = json.loads(file.read_text())
    assert list(results["rows"]) == ["baseline", "average", "merging", "explicit", "ours"]
    for name, row in results["rows"].items():
        assert 0 < row["waited_range_s"][0] <= row["waited_s"] <= row["waited_range_s"][1], name
        assert row["parameters"] > 1e4
    cost = {name: row["forward_gflop"] for name, row in results["rows"].items()}
    assert cost["baseline"] < cost["ours"] < cost["explicit"] == cost["average"] < cost["merging"]
