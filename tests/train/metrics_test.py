"""What a run tells of its speed: rates, goodput over restarts, traces, Weights & Biases."""

import json
import time

import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX  # noqa: F401  loaded at the first line else, which takes its time

from fourdstar_jax.cli.train import read_config
from fourdstar_jax.train import metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps, first_step=0, config=None):
    writer = metrics.MetricWriter(
        folder, total_steps=9, first_step=first_step, config=config,
        work=lambda batch: {"objects": 4, "tokens": 40, "tflop": 0.5},
    )  # fmt: skip
    for step in range(first_step + 1, first_step + steps + 1):
        with writer.waiting():
            time.sleep(0.01)
        writer.count({"objects": 4})
        time.sleep(0.04)
        writer.write(step, {"loss": 1.0})
    writer.close()


def test_rates_and_goodput_over_a_restart(tmp_path):
    write(tmp_path, 3)
    time.sleep(0.5)  # it is down, and its third step was not saved
    write(tmp_path, 2, first_step=2)
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [1, 2, 3, 3, 4]
    for row in found:
        np.testing.assert_allclose(row["train/tokens_per_s"], 10 / 8 * row["train/objects_per_s"])
        assert 4 / 0.3 < row["train/objects_per_s"] < 4 / 0.05
        assert 0.05 < row["train/data_wait"] < 0.9
    kept = [row["train/kept_s"] for row in found]
    assert kept[1] < kept[3] < kept[2] + 0.2 and kept[4] > kept[3]
    wall = found[4]["train/time"] - found[0]["train/time"] + kept[0]
    np.testing.assert_allclose(found[4]["train/goodput"], kept[4] / wall, rtol=0.05)
    assert found[2]["train/goodput"] > 0.8 > 0.55 > found[3]["train/goodput"]


def test_steps_are_traced(tmp_path):
    config = read_config("configs/star.py:tiny", ["--config.profile=2:3"])
    before = metrics.profiled(config.profile)
    assert before is not None
    for step in range(1, 5):
        before(step, tmp_path / "profile")
        (jnp.ones(3) * step).block_until_ready()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    for wrong in ("3", "3:2", "0:1", "a:b"):
        with pytest.raises(ValueError, match=f"^--profile {wrong}: FIRST:LAST"):
            metrics.profiled(wrong)


def test_the_log_goes_to_weights_and_biases(tmp_path, monkeypatch):
    """The real one, which keeps it in a file here."""
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = read_config("configs/star.py:tiny", ["--config.wandb=test"])
    write(tmp_path, 2, config=config)
    (file,) = tmp_path.rglob("*.wandb")
    assert b"train/objects_per_s" in file.read_bytes()


def test_weights_and_biases_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    config = read_config("configs/star.py:tiny", ["--config.wandb=test"])
    with pytest.raises(ValueError, match=r"needs wandb: pip install 'fourdstar-jax\[wandb\]'"):
        write(tmp_path, 1, config=config)


@pytest.mark.parametrize(
    "first, said",
    [
        (0, "the run begins, to step 9; its first step is compiled"),
        (4, "the run goes on after step 4, to step 9; its first step is compiled"),
        (9, "the run is at step 9 of 9: nothing is left to train"),
    ],
)
def test_a_run_says_at_once_what_it_is_about_to_do(tmp_path, capsys, first, said):
    write(tmp_path, 0, first_step=first)
    assert capsys.readouterr().err == f"{said}\n"
