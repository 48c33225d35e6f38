"""State over a mesh, optimizer, checkpoints with the data iterator inside."""

import functools
import math
import resource
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from fourdstar_jax import nn, sharding
from fourdstar_jax.train import checkpoint, optim
from fourdstar_jax.train import state as train_state
from fourdstar_jax.train.checkpoint import Checkpoints
from fourdstar_jax.train.workdir import Workdir

MODEL = dict(dim=8, hidden_dim=16)


def make_tx(muon=False):
    schedule = optim.learning_rate_schedule(learning_rate=1e-2, warmup_steps=2, total_steps=7)
    return optim.make_optimizer(
        schedule, b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0, muon=muon, average=0.99
    )


def make_step(graphdef, tx):
    def loss(params, rest, x):
        model = nnx.merge(graphdef, params, rest)
        return jnp.mean((model(x) - 1.0) ** 2)

    @jax.jit
    def step(state, x):
        value, grads = jax.value_and_grad(loss)(state.params, state.rest, x)
        return train_state.apply_gradients(state, grads, tx), value

    return step


def run(mesh_shape, num_devices, steps=5, muon=False):
    with sharding.use_mesh(mesh_shape, devices=jax.devices()[:num_devices]) as mesh:
        tx = make_tx(muon)
        graphdef, state = train_state.create(nn.SwiGLU, MODEL, tx, jax.random.key(0), mesh)
        step = make_step(graphdef, tx)
        x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
        losses = []
        for _ in range(steps):
            state, value = step(state, train_state.to_device({"x": x}, mesh)["x"])
            losses.append(float(value))
        return state, losses


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 4}, {"fsdp": 8}, {"data": 8}])
def test_the_host_reserves_room_for_what_orbax_copies_to_it(mesh, monkeypatch):
    state, _ = run(mesh, 8, steps=1)
    pieces = checkpoint._pieces(state)
    needed = sum(x.nbytes for x in jax.tree.leaves(state))
    sizes = [np.dtype(dtype).itemsize * math.prod(shape) for _, shape, dtype in pieces]
    assert sum(sizes) == needed  # of each part one copy, whatever device has it
    checkpoint._make_pinned(pieces)
    monkeypatch.setattr(checkpoint, "PINNED", "none")  # a device without
    checkpoint._make_pinned(pieces)


def test_rows_that_devices_do_not_divide_are_whole_on_each():
    with sharding.use_mesh({"data": 4}, devices=jax.devices()[:4]) as mesh:
        for rows, whole in ((8, False), (3, True), (6, True)):
            x = np.arange(2 * rows).reshape(rows, 2)
            placed = train_state.to_device({"x": x}, mesh)["x"]
            np.testing.assert_array_equal(placed, x)
            assert placed.sharding.is_fully_replicated == whole


def test_a_flat_rate_falls_at_the_end():
    options = dict(learning_rate=0.5, warmup_steps=2, decay=0.25)
    short, long = (optim.learning_rate_schedule(total_steps=n, **options) for n in (8, 16))
    np.testing.assert_allclose([short(i) for i in range(9)], [0, 0.25] + [0.5] * 5 + [0.25, 0])
    assert [float(long(i)) for i in range(7)] == [float(short(i)) for i in range(7)]
    with pytest.raises(ValueError, match="decay=2 must be a share of the steps"):
        optim.learning_rate_schedule(total_steps=8, learning_rate=1.0, warmup_steps=0, decay=2)


def test_eight_devices_agree_with_one():
    one, losses_one = run({"data": 1}, 1)
    eight, losses_eight = run({"data": 2, "fsdp": 2, "tensor": 2}, 8)
    np.testing.assert_allclose(losses_eight, losses_one, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-4, atol=1e-6)
    assert losses_one[-1] < losses_one[0]


def test_moments_lie_as_their_parameters_do():
    state, _ = run({"fsdp": 4, "tensor": 2}, 8, steps=1)
    kernel = state.params["gate"]["kernel"].get_value()
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (8, 16)]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    assert len(moments) == 6 and all(x.sharding == kernel.sharding for x in moments)


def test_vectors_are_not_decayed_also_where_layers_are_stacked():
    schedule = optim.learning_rate_schedule(learning_rate=0.1, warmup_steps=0, total_steps=9)
    tx = optim.make_optimizer(schedule, b1=0.9, b2=0.95, weight_decay=0.5, clip_norm=1.0)
    params = {
        "norm": {"scale": jnp.ones((3, 4))},
        "attn": {"q_bias": jnp.ones((3, 4)), "gate": {"kernel": jnp.ones((3, 4, 4))}},
        "gate": jnp.ones((3, 4)),
        "token": jnp.ones(4),
    }
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kernel = updates["attn"]["gate"].pop("kernel")
    np.testing.assert_allclose(kernel, -0.05, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_muon_turns_all_directions_of_a_kernel_alike():
    """Each of stacked kernels by itself, at AdamW's size; tables and vectors go by NAdam."""
    keys = jax.random.split(jax.random.key(0), 3)
    grads = {
        "kernel": jax.random.normal(keys[0], (2, 32, 16)) * jnp.array([1.0, 100.0])[:, None, None],
        "table": jax.random.normal(keys[1], (8, 4)),
        "conv": {"kernel": jax.random.normal(keys[2], (3, 3, 4, 4))},
        "scale": jnp.ones(4),
    }
    params = jax.tree.map(jnp.zeros_like, grads)

    def updates(tx):
        return tx.update(grads, tx.init(params), params)[0]

    settings = dict(b1=0.9, b2=0.95, weight_decay=0.0)
    found = updates(optim.make_optimizer(lambda _: 0.1, muon=True, clip_norm=1e9, **settings))
    plain = updates(optax.adamw(0.1, nesterov=True, **settings))
    for update, grad in zip(found.pop("kernel"), grads["kernel"], strict=True):
        u, _, vt = np.linalg.svd(np.asarray(grad), full_matrices=False)
        sizes = -np.diag(u.T @ np.asarray(update) @ vt.T) / (0.1 * 0.2 * np.sqrt(32))
        assert sizes.min() > 0.6 and sizes.max() < 1.3  # five steps of Newton and Schulz
    plain.pop("kernel")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, plain)


def test_muon_trains_over_a_mesh_as_on_one_device():
    one, alone = run({"data": 1}, 1, steps=3, muon=True)
    many, sharded = run({"fsdp": 4, "tensor": 2}, 8, steps=3, muon=True)
    np.testing.assert_allclose(sharded, alone, rtol=1e-5)
    same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, jax.device_get(many.params), jax.device_get(one.params))


def test_parts_learn_at_their_own_rates():
    """The longest prefix of whole words counts; one that fits nothing is named."""
    schedule = optim.learning_rate_schedule(learning_rate=0.1, warmup_steps=0, total_steps=9)
    params = {
        "static": {"up": jnp.ones(3), "up2": jnp.ones(3), "head": {"kernel": jnp.ones((2, 2))}},
        "offsets": jnp.ones(2),
    }

    def updates(**options):
        tx = optim.make_optimizer(
            schedule, b1=0.9, b2=0.95, weight_decay=0.5, clip_norm=1.0, **options
        )
        return tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)[0]

    plain = updates()
    found = updates(factors=(("static", 0.1), ("static/up", 0.5)))
    factors = {"static": {"up": 0.5, "up2": 0.1, "head": {"kernel": 0.1}}, "offsets": 1.0}
    for a, b, factor in zip(*map(jax.tree.leaves, (found, plain, factors)), strict=True):
        np.testing.assert_allclose(a, factor * b, rtol=1e-6)
    with pytest.raises(
        ValueError, match="no parameter is of 'stat'; there are offsets, static/head"
    ):
        updates(factors=(("stat", 0.1),))


def test_the_average_follows_the_parameters():
    tx = optax.chain(optax.sgd(1.0), optim.keep_average(0.5))
    params = {"w": jnp.zeros(2)}
    state, wanted = tx.init(params), 0.0
    for step in range(12):
        updates, state = tx.update({"w": jnp.full(2, -1.0)}, state, params)
        params = optax.apply_updates(params, updates)
        rate = min(0.5, (1 + step) / (10 + step))
        wanted = rate * wanted + (1 - rate) * (step + 1)
        np.testing.assert_allclose(optim.averaged(state, params)["w"], wanted, rtol=1e-6)
    assert optim.averaged(optax.sgd(1.0).init(params), params) is params


def test_restores_state_and_iterator_on_another_mesh(tmp_path):
    def dataset():
        return iter(grain.MapDataset.range(100).seed(0).shuffle().repeat().to_iter_dataset())

    state, _ = run({"data": 1}, 1, steps=3)
    iterator = dataset()
    seen = [next(iterator) for _ in range(7)]
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(3, state, iterator)
    checkpoints.close()
    expected = [next(iterator) for _ in range(5)]

    with sharding.use_mesh({"fsdp": 2, "tensor": 4}) as mesh:
        _, fresh = train_state.create(nn.SwiGLU, MODEL, make_tx(), jax.random.key(1), mesh)
        again = dataset()
        checkpoints = Checkpoints(tmp_path, every=1)
        restored, again = checkpoints.restore(fresh, again)
        checkpoints.close()
        assert int(restored.step) == 3
        for a, b, c in zip(*map(jax.tree.leaves, (state, restored, fresh)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
            assert b.sharding == c.sharding
    assert [next(again) for _ in range(5)] == expected and len(set(seen)) == 7


def test_a_save_that_fails_is_told_and_those_before_it_stay(tmp_path):
    """Files above a limit, as on a full disk: in the background, so that the next call tells."""
    big = {"w": jnp.asarray(np.random.default_rng(0).random((300, 1000)), jnp.float32)}

    def state(step):
        return train_state.TrainState(jnp.int32(step), big, {}, {"m": jnp.ones(3)})  # pyright: ignore

    def dataset():
        return iter(grain.MapDataset.range(100).to_iter_dataset())

    iterator, checkpoints = dataset(), Checkpoints(tmp_path, every=1, keep=3)
    for step in (1, 2):
        next(iterator)
        checkpoints.save(step, state(step), iterator)
    checkpoints._manager.wait_until_finished()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        checkpoints.save(3, state(3), iterator)
        with pytest.raises(
            ValueError, match="checkpoints in .* cannot be written: .*File too large"
        ):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.latest_step() == 2

    again = Checkpoints(tmp_path, every=1, keep=3)
    assert again.latest_step() == 2 and again._manager.all_steps() == [1, 2]
    restored, iterator = again.restore(state(0), dataset())
    assert int(restored.step) == 2 and next(iterator) == 2
    again.save(3, state(3), iterator)
    again.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_change_nothing(mesh, bad):
    graphdef, state = train_state.create(nn.SwiGLU, MODEL, make_tx(), jax.random.key(1), mesh)
    grads = jax.tree.map(jnp.ones_like, state.params)
    state = train_state.apply_gradients(state, grads, make_tx())
    leaves, structure = jax.tree.flatten(grads)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].set(bad)
    broken = jax.tree.unflatten(structure, leaves)
    after = train_state.apply_gradients(state, broken, make_tx())
    assert int(after.step) == int(state.step) + 1 == 2
    for a, b in zip(jax.tree.leaves(after[1:]), jax.tree.leaves(state[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def small_state(step):
    params: Any = {"w": jnp.full((64, 64), step, jnp.float32)}
    return train_state.TrainState(jnp.int32(step), params, {}, {"m": jnp.ones(3)})  # pyright: ignore


def small_dataset():
    return iter(grain.MapDataset.range(100).to_iter_dataset())


@pytest.mark.parametrize("harm", ["flipped", "cut", "lost", "unreadable"])
def test_a_damaged_step_is_named_and_the_one_before_it_is_taken(tmp_path, capsys, harm):
    checkpoints, iterator = Checkpoints(tmp_path, every=1, keep=3), small_dataset()
    for step in (1, 2):
        next(iterator)
        checkpoints.save(step, small_state(step), iterator)
    checkpoints.close()
    newest = tmp_path / "checkpoints" / "2"
    files = [path for path in (newest / "state").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    elif harm == "cut":
        victim.write_bytes(data[:-1])
    elif harm == "lost":
        victim.unlink()
    else:
        victim = newest / checkpoint.HASHES
        victim.write_bytes(b"{")

    again = Checkpoints(tmp_path, every=1, keep=3)
    told = capsys.readouterr().err
    assert f"checkpoint {newest} is damaged: " in told and victim.name in told
    assert again.latest_step() == 1 and again._manager.all_steps() == [1]
    restored, iterator = again.restore(small_state(0), small_dataset())
    assert int(restored.step) == 1 and next(iterator) == 1
    again.save(2, small_state(2), iterator)
    again.close()
    third = Checkpoints(tmp_path, every=1, keep=3)
    third.close()
    assert third.latest_step() == 2 and capsys.readouterr().err == ""


def test_a_step_without_hashes_counts(tmp_path, capsys):
    """As a run leaves it that was killed while it took them."""
    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(1, small_state(1), small_dataset())
    checkpoints.close()
    (tmp_path / "checkpoints" / "1" / checkpoint.HASHES).unlink()
    again = Checkpoints(tmp_path, every=1)
    again.close()
    assert again.latest_step() == 1
    assert capsys.readouterr().err == ""


def test_a_checkpoint_of_another_config_is_told(tmp_path):
    def state(size):
        params: Any = {"w": jnp.ones(size)}
        return train_state.TrainState(jnp.int32(1), params, params, params)

    def dataset():
        return iter(grain.MapDataset.range(100).to_iter_dataset())

    checkpoints = Checkpoints(tmp_path, every=1)
    checkpoints.save(1, state(3), dataset())
    checkpoints.close()
    with pytest.raises(ValueError, match="of step 1 do not fit this config") as error:
        Checkpoints(tmp_path, every=1).restore(state(5), dataset())
    assert "\n" not in str(error.value)


def test_weight_decay_leaves_vectors_alone():
    tx = make_tx()
    params = {"matrix": jnp.ones((3, 5)), "vector": jnp.ones(7)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    opt_state = tx.init(params)
    for _ in range(3):
        updates, opt_state = tx.update(zeros, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert np.all(np.asarray(params["matrix"]) < 1) and np.all(np.asarray(params["vector"]) == 1)


def test_unknown_mesh_axis_and_wrong_size_are_named():
    with pytest.raises(ValueError, match="model"), sharding.use_mesh({"model": 2}):
        pass
    with pytest.raises(ValueError, match="3 devices"), sharding.use_mesh({"data": 3}):
        pass


def test_a_run_needs_a_folder_of_its_own(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a dataset or another output"):
        Workdir(tmp_path)
