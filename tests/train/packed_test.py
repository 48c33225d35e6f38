"""A run that is packed, carried elsewhere and unpacked goes on as if nothing had been."""

import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import cli
from fourdstar_jax.train import optim, packed
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints


def trained(run, last):
    """A toy's state after step `last`, from the newest checkpoint in the run, which it saves."""
    tx = optim.make_optimizer(
        lambda step: 1e-2, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0, average=0.99
    )
    params = nnx.State({"w": jax.random.normal(jax.random.key(0), (100, 100))})
    state = train_state.TrainState(jnp.int32(0), params, nnx.State({}), tx.init(params))
    data = iter(grain.MapDataset.range(50).seed(0).shuffle().repeat().to_iter_dataset())
    checkpoints = Checkpoints(run, every=1)
    state, data = checkpoints.restore(state, data)

    @jax.jit
    def step_fn(state, x):
        grads = jax.grad(lambda params: jnp.sum(jnp.sin(params["w"] * x)))(state.params)
        return train_state.apply_gradients(state, grads, tx)

    for _ in range(int(state.step), last):
        state = step_fn(state, next(data))
    checkpoints.save(last, state, data, force=True)
    checkpoints.close()
    return jax.tree.map(np.asarray, state)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "run"
    trained(folder, 2)
    trained(folder, 3)
    (folder / "metrics.jsonl").write_text('{"step": 3}\n')
    (folder / "best").mkdir()
    (folder / "best/model.json").write_text("{}")
    (folder / "events.out").write_text("not needed")
    return folder


@pytest.fixture
def parts(run, tmp_path):
    packed.pack(run, tmp_path / "parts", part_bytes=30_000)
    return tmp_path / "parts"


def refused(parts, tmp_path, capsys):
    assert cli.main(["pack", "--reverse", str(parts), str(tmp_path / "there")]) == 2
    assert not (tmp_path / "there").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_an_unpacked_run_goes_on_bit_for_bit(run, parts, tmp_path, capsys):
    sizes = [path.stat().st_size for path in sorted(parts.glob("part-*.bin"))]
    assert len(sizes) > 3 and set(sizes[:-1]) == {30_000} and sizes[-1] <= 30_000
    assert cli.main(["pack", "--reverse", str(parts), str(tmp_path / "there")]) == 0
    assert f"in {len(sizes)} parts" in capsys.readouterr().out
    there = tmp_path / "there"
    assert [path.name for path in (there / "checkpoints").iterdir()] == ["3"]
    found = [path for path in there.rglob("*") if path.is_file()]
    assert there / "best/model.json" in found and there / "metrics.jsonl" in found
    assert there / "events.out" not in found
    for path in found:
        assert path.read_bytes() == (run / path.relative_to(there)).read_bytes()
    straight, resumed = trained(tmp_path / "straight", 5), trained(there, 5)
    for a, b in zip(*map(jax.tree.leaves, (straight, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_damaged_checkpoint_is_not_packed(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    file = next((tmp_path / "run/checkpoints/3").rglob("d/*"))
    file.write_bytes(b"x" + file.read_bytes()[1:])
    assert cli.main(["pack", str(tmp_path / "run"), str(tmp_path / "parts")]) == 0
    said = capsys.readouterr()
    assert "checkpoints/3 is damaged" in said.err and said.out.startswith("step 2, ")
    assert cli.main(["pack", str(tmp_path / "run/best"), str(tmp_path / "parts")]) == 2
    assert "there is no sound checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["missing", "cut", "flipped"])
def test_a_part_that_is_not_as_written_is_named(what, parts, tmp_path, capsys):
    part = parts / "part-0001.bin"
    data = bytearray(part.read_bytes())
    part.unlink()
    if what == "cut":
        part.write_bytes(data[:-1])
    if what == "flipped":
        data[100] ^= 1
        part.write_bytes(data)
    words = {"missing": "is missing", "cut": "has 29999 bytes, not 30000", "flipped": "is damaged"}
    assert f"part-0001.bin {words[what]}" in refused(parts, tmp_path, capsys)


@pytest.mark.parametrize(
    "path",
    ["/etc/x", "../x", "checkpoints/3/../../../x", "best/..", "best/.", "best/a/", "other/x", "x"],
)
def test_no_file_leaves_the_run(path, parts, tmp_path, capsys):
    manifest = json.loads((parts / "manifest.json").read_text())
    manifest["files"][0]["path"] = path
    (parts / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json: files[0].path must be" in refused(parts, tmp_path, capsys)


def test_a_run_is_not_replaced(run, parts, capsys):
    assert cli.main(["pack", "--reverse", str(parts), str(run)]) == 2
    assert "is not empty" in capsys.readouterr().err
