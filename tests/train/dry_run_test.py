"""What `fourdstar train --dry-run` and `--plan` say of a step, against the step itself."""

import jax
import numpy as np
import pytest

from fourdstar_jax import bundle, sharding
from fourdstar_jax.cli.train import read_config
from fourdstar_jax.star.model import STAR
from fourdstar_jax.train import dry_run, optim
from fourdstar_jax.train import state as train_state
from tests.helpers import TINY

SMALL = [
    "--config.model.num_layers=1", "--config.model.dim=32", "--config.model.num_heads=1",
    "--config.model.hidden_dim=32", "--config.model.head_dim=16", "--config.data.timesteps=2",
]  # fmt: skip


def config_of(*more):
    return read_config("configs/star.py:tiny", [*SMALL, *more])


def test_bytes_are_those_of_the_state_on_each_device(monkeypatch):
    """And large arrays that all devices hold are named."""
    monkeypatch.setattr(dry_run, "LARGE", 1)
    config = config_of("--config.mesh.data=2", "--config.mesh.fsdp=4", "--config.batch_size=16")
    found = dry_run.look(config, jax.devices()[:8], views=2)
    assert found["mesh"] == {"data": 2, "fsdp": 4} and "program_bytes" not in found
    schedule = optim.learning_rate_schedule(**config.schedule, total_steps=config.steps)
    tx = optim.make_optimizer(schedule, **config.optim)
    arguments = bundle.module_arguments("star", config.model.to_dict() | {"text_vocab": 8})
    with sharding.use_mesh({"data": 2, "fsdp": 4}, devices=jax.devices()[:8]) as mesh:
        _, state = train_state.create(STAR, arguments, tx, jax.random.key(0), mesh)

    def on_first(tree):
        return sum(
            shard.data.nbytes
            for x in jax.tree.leaves(tree)
            for shard in x.addressable_shards
            if shard.device == jax.devices()[0]
        )

    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(state.params))
    assert found["bytes"]["parameters"] == on_first(state.params)
    assert found["bytes"]["optimizer"] == on_first(state.opt_state)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
    }
    assert {name for name, x in names.items() if x.is_fully_replicated} <= set(found["replicated"])
    assert not {name for name, x in names.items() if not x.is_fully_replicated} & set(
        found["replicated"]
    )
    lines = list(dry_run.told(found))
    assert any(line.startswith("  whole on every device: head/output/value") for line in lines)
    assert "on 8 x cpu (data=2 fsdp=4)" in lines[0] and "not compiled" in lines[-1]


def test_a_plan_recomputes_as_little_and_in_as_few_parts_as_fit(monkeypatch):
    needs = {"products": 9e9, "attention": 7e9, "nothing": 4e9}
    tried = []

    def look(config, devices, **_):
        saves, parts = config.model.remat_saves, config.accumulate
        tried.append((saves, parts))
        needed = needs[saves] + (0 if config.model.scan_layers else 1e9)
        return {"program_bytes": 1e9 + needed / parts, "device": "x"}

    monkeypatch.setattr(dry_run, "look", look)
    config, device = read_config("configs/star.py:paper", []), jax.devices()[:1]

    def plan(memory):
        return dry_run.plan(config, memory, device, log=str)

    products = {"model.remat": True, "model.remat_saves": "products"}
    assert plan(4.01) == products | {"accumulate": 4}
    assert plan(1.15) == products | {"model.scan_layers": True, "accumulate": 64}
    assert plan(11)["accumulate"] == 1 and plan(1.0) is None
    assert ("nothing", 64) in tried


def test_the_vqvae_and_stages_without_one(tmp_path):
    tiny = [f"--config.bundle={TINY}"]
    found = dry_run.look(read_config("configs/vqvae.py:tiny,unitok", tiny), jax.devices()[:1])
    assert found["parameters"] > 1e5 and found["tflop"] > 0
    with pytest.raises(ValueError, match="--dry-run is for star and vqvae, not tokenizer"):
        dry_run.look(read_config("configs/tokenizer.py:tiny", []))


def test_the_program_is_that_of_the_trainer(capsys):
    """Compiled, though for a CPU: arguments and results are those that were counted."""
    found = dry_run.look(config_of(), jax.devices()[:1], views=2, compile=True)
    counted = found["bytes"]
    state = counted["parameters"] + counted["optimizer"]
    held = found["program_bytes"] - found["temporary_bytes"]
    np.testing.assert_allclose(held, state + counted["batch"] + counted["rest"], rtol=0.02)
