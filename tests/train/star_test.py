"""STAR's trainer: what clips and views it draws, and its step in parts and on many devices."""

import functools

import jax
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from fourdstar_jax import sharding
from fourdstar_jax.star.model import STAR
from fourdstar_jax.train import bench_star, star, views
from fourdstar_jax.train import state as train_state

SIZES = dict(
    num_codebooks=2, vocab_size=7, code_dim=6, resolution=10, grid=2, dim=24, num_layers=1,
    num_heads=3, head_dim=10, head_layers=1, head_heads=1, container_slots=5,
    container_neighbors=2, text_encoder="words", text_vocab=11, text_length=5, text_dim=6,
    time_features=8, spe_octaves=2,
)  # fmt: skip


def test_views_come_in_another_order_with_their_cameras():
    shape = (2, 5)
    views = np.broadcast_to(np.arange(5), shape)
    batch = {
        "viewmats": np.broadcast_to(views[:, :, None, None], (*shape, 4, 4)),
        "Ks": np.broadcast_to(views[:, :, None, None], (*shape, 3, 3)),
        "tokens": np.broadcast_to(views[:, None, :, None, None], (2, 3, 5, 6, 2)),
    }
    orders = set()
    for step in range(20):
        found = star.in_order(star.reordered(batch, 0, step))
        assert found.keys() == batch.keys()
        order = tuple(int(x) for x in found["viewmats"][0, :, 0, 0])
        np.testing.assert_array_equal(found["tokens"][1, 2, :, 3, 1], order)
        np.testing.assert_array_equal(found["Ks"][1, :, 2, 2], order)
        assert found["tokens"].shape == batch["tokens"].shape
        assert order[0] == 0 and sorted(order) == list(range(5))
        orders.add(order)
    assert len(orders) > 5
    assert star.in_order(batch).keys() == batch.keys()


def step_of(mesh_shape, parts):
    """The state and metrics after a step that draws nothing."""
    devices = jax.devices()[: int(np.prod(list(mesh_shape.values())))]
    tx = optax.adam(1e-3)
    with sharding.use_mesh(mesh_shape, devices=devices) as mesh:
        sizes = {name: x for name, x in SIZES.items() if name != "text_encoder"}
        graphdef, state = train_state.create(STAR, sizes, tx, jax.random.key(0), mesh)
        batch = bench_star.make_batch(SIZES, objects=16, timesteps=2, views=2)
        step = functools.partial(
            star.train_step, graphdef, tx=tx, loss_config={"z_loss": 1e-4}, accumulate=parts,
            forcing_config=dict(drop_text=0.0, drop_video=0.0, drop_history=0.0, code_noise=0.0),
        )  # fmt: skip
        batch = train_state.to_device(batch, mesh)
        return jax.device_get(jax.jit(step)(state, batch, jax.random.key(1)))


def test_parts_of_a_batch_on_eight_devices_are_as_the_whole_on_one():
    state, metrics = step_of({"data": 4, "fsdp": 2}, 2)
    wanted, told = step_of({"data": 1}, 1)
    assert set(metrics) == set(told)
    for name, value in told.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    moments = [jax.tree.leaves(x.opt_state[0].mu) for x in (state, wanted)]  # of the gradients
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-10)


def test_tokens_and_pictures_in_a_store_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens/spec.json").write_text("{}")
    monkeypatch.setattr(views.remote, "fetched", lambda url: tmp_path / url.removeprefix("s3://b/"))
    monkeypatch.setattr(views.bundle, "read", lambda folder: None)

    class Opened(Exception):
        pass

    def opens(kind):
        def it(*_):
            raise Opened(kind)

        return it

    for kind in ("tokens", "pictures"):
        monkeypatch.setattr(views, f"_{kind}", opens(kind))
    for kind in ("tokens", "pictures"):
        config = ConfigDict(dict(bundle="", data=dict(dir=f"s3://b/{kind}")))
        with sharding.use_mesh(devices=jax.devices()[:1]) as mesh:
            with pytest.raises(Opened, match=kind):
                views.open_source(config, mesh)
