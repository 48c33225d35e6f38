"""A run whose data, folder and bundles are in an object store."""

import json

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import store

from fourdstar_jax import bundle, cli, remote
from fourdstar_jax.data import prepare
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import COMPLETE, Checkpoints

CONFIG = "--config=tests/helpers/small_tokenizer.py"


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with store.started(tmp_path_factory.mktemp("cache")) as url:
        yield url


@pytest.fixture(autouse=True)
def mesh(monkeypatch):
    """None around a trainer, which makes its own of the devices that it finds: one."""
    devices = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *args: devices)


def train(data, workdir):
    words = [CONFIG, "--config.steps=6", f"--config.data.dir={data}"]
    return cli.main(["train", *words, f"--workdir={workdir}"])


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def test_data_run_and_tokens_in_a_store(bucket, objects_dir, tmp_path):
    """A run that dies there and goes on is one that was never outside this machine."""
    options = dict(image_size=16, views=2, extra_views=1, max_frames=3, workers=0)
    local, data, run = tmp_path / "data", f"{bucket}/data", f"{bucket}/runs/a"
    prepare.prepare(objects_dir, local, **options, log=lambda line: None)
    files = [path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()]
    remote.send(local, data, files)

    def die(self, done, *args, **kwargs):
        save(self, done, *args, **kwargs)
        if done == 4:
            self._manager.wait_until_finished()
            raise ValueError("it dies")

    save = Checkpoints.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", die)
        with pytest.raises(ValueError, match="it dies"):
            train(data, run)
    assert f"checkpoints/4/{COMPLETE}" in remote.names(run)
    assert train(data, run) == train(local, tmp_path / "straight") == 0
    assert {"metrics.jsonl", "bundle/model.json"} <= set(remote.names(run))
    assert losses(remote.fetched(run)) == losses(tmp_path / "straight")
    assert len(losses(remote.fetched(run))) == 6
    sums = [bundle.read(f"{x}/bundle").weights_sha256() for x in (run, tmp_path / "straight")]
    assert sums[0] == sums[1]
    tokens = f"{bucket}/tokens"
    assert cli.main(["tokenize", "--data", data, "--bundle", f"{run}/bundle", "--out", tokens]) == 0
    assert {"spec.json", "train.array_record"} <= set(remote.names(tokens))


def state(step):
    params = {"w": jnp.full((64, 64), step, jnp.float32)}
    return train_state.TrainState(jnp.int32(step), params, {}, {"m": jnp.ones(3)})  # pyright: ignore


def dataset():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


def test_a_damaged_and_an_incomplete_step_in_a_store(bucket, tmp_path, capsys):
    run = f"{bucket}/runs/b"
    checkpoints, iterator = Checkpoints(run, every=1, keep=3), dataset()
    for step in (1, 2, 3):
        next(iterator)
        checkpoints.save(step, state(step), iterator)
    checkpoints.close()
    remote.remove(f"{run}/checkpoints/3/{COMPLETE}")
    names = remote.names(f"{run}/checkpoints/2")
    assert "sha256.json" in names
    victim = next(name for name in names if "/d/" in name)
    (tmp_path / "x").write_bytes(b"other")
    remote.store_of(run).put(str(tmp_path / "x"), f"{run}/checkpoints/2/{victim}")

    again = Checkpoints(run, every=1, keep=3)
    assert f"{victim} has changed. It is set aside as damaged-2" in capsys.readouterr().err
    restored, iterator = again.restore(state(0), dataset())
    assert int(restored.step) == 1 and next(iterator) == 1
    np.testing.assert_array_equal(restored.params["w"], np.full((64, 64), 1.0))
    again.save(2, state(2), iterator)
    again.close()
    assert Checkpoints(run, every=1).latest_step() == 2
