"""What is measured of free samples: against copying, and from picture to picture."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.perceptual import lpips
from fourdstar_jax.train import free

B, T, V, N, K = 2, 3, 3, 5, 2


def draw(seed, *shape):
    return np.random.default_rng(seed).integers(1, 9, (*shape, K))


def test_accuracy_is_measured_against_copying():
    truth = np.broadcast_to(draw(0, B, 1, V, N), (B, T, V, N, K)).copy()  # still
    found = free.accuracies(truth, truth)
    assert found["accuracy"] == 1 and 0.5 < found["copy_accuracy"] < 1
    assert found["over_copy_t2"] == found["over_copy_t3"] == 0 < found["over_copy_t1"]
    truth[:, 1:, 2] = draw(1, B, T - 1, N)  # the last view changes, and the sample knows
    samples = truth.copy()
    samples[:, :, 1] = 0
    found = free.accuracies(samples, truth)
    assert found["over_copy_view1"] < -0.5 < 0.5 < found["over_copy_view2"]
    half = truth.copy()
    half[:, :, :, :3] = 0  # blank
    assert free.accuracies(0 * half, half)["accuracy"] > 0.5
    assert free.accuracies(0 * half, half, blank_code=0)["accuracy"] == 0


def test_a_past_that_is_kept_and_one_that_is_not():
    truth = np.broadcast_to(draw(0, B, 1, V, N), (B, T, V, N, K))
    fixed, other = (np.broadcast_to(draw(i, B, 1, V, N), (B, T, V, N, K)) for i in (1, 2))
    found = {"real": fixed, "other": other, "frozen": draw(3, B, T, V, N), "other_frozen": other}
    shares = free.shares_of_the_past(found, truth)
    assert shares["propagation"] == 1 and shares["propagation_frozen"] < 0.3
    assert free.shares_of_the_past({k: x[:, :1] for k, x in found.items()}, truth[:, :1]) == {}


def test_changes_are_those_from_picture_to_picture():
    keys = jax.random.split(jax.random.key(0), 40)
    shapes, structure = jax.tree.flatten(lpips.shapes())
    arrays = [0.1 * jax.random.uniform(k, x.shape) for k, x in zip(keys, shapes, strict=False)]
    network = jax.tree.unflatten(structure, arrays)
    truth = jax.random.uniform(jax.random.key(1), (2, 2, 16, 16, 3))
    masks = jnp.ones((2, 2, 16, 16, 1))
    still = jnp.broadcast_to(truth[:1], truth.shape)
    found = free.compared(network, truth, masks, still, still)
    assert found["change"] == found["frozen_change"] == 0 < found["true_change"]
    np.testing.assert_allclose(found["lpips"], found["true_change"] / 2, rtol=1e-4)
    assert free.compared(None, truth, masks, still, still).keys() == {"psnr_in_mask"}


PROCESS = """
import json
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from fourdstar_jax import geometry, processes, sharding
from fourdstar_jax.star.model import STAR
from fourdstar_jax.train import free, optim, state as train_state

SIZES = dict(
    num_codebooks=2, vocab_size=16, code_dim=8, resolution=8, grid=2, dim=16, num_layers=1,
    num_heads=2, head_dim=16, head_layers=1, head_heads=2, container_slots=3, text_vocab=4,
    container_neighbors=2, text_length=2, normalize=True, rope="axial", predict_input_view=False,
    inject="both", container_place=0.25,
)
B, T, V, n = 3, 2, 2, 4
rig = geometry.orbit_cameras([0.0, 180.0], width=8, height=8)
batch = dict(
    tokens=np.random.default_rng(0).integers(0, 16, (B, T, V, n, 2), np.int32),
    text_ids=np.ones((B, 2), np.int32), times=np.tile(np.arange(T, dtype=np.float32), (B, 1)),
    viewmats=np.tile(rig.viewmats, (B, 1, 1, 1)), Ks=np.tile(rig.Ks, (B, 1, 1, 1)),
)
with processes.joined(processes.find()), sharding.use_mesh(dict(fsdp=-1)) as mesh:
    schedule = dict(b1=0.9, b2=0.95, weight_decay=0.0, clip_norm=1.0, average=0.9)
    tx = optim.make_optimizer(1e-3, **schedule)
    graphdef, state = train_state.create(STAR, SIZES, tx, jax.random.key(0), mesh)
    move = jax.jit(lambda x: x + 0.3 * jax.random.normal(jax.random.key(1), x.shape))
    model = nnx.merge(graphdef, jax.tree.map(move, state.params), state.rest)
    condition = train_state.replicate(free.condition_of(batch), mesh)
    settings = dict(temperature=0.5, cfg_scale=1.5)
    sampler = free.Sampler(batch, condition, jax.random.key(0), mesh, None, None, settings)
    tokens = sampler.sample(model)
    figures, _ = sampler.measure(tokens)
    print(json.dumps([figures, {k: x.tolist() for k, x in tokens.items()}]))
"""


@pytest.mark.slow
def test_two_processes_sample_what_one_does():
    """Weights in two halves, three clips that two devices cannot share."""

    def run(count):
        with socket.create_server(("localhost", 0)) as server:
            address = f"localhost:{server.getsockname()[1]}"
        started = []
        for index in range(count):
            environ = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
            if count > 1:
                environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
                environ["JAX_PROCESS_ID"] = str(index)
            words = [sys.executable, "-c", PROCESS]
            started.append(subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, text=True))
        outputs = [process.communicate(timeout=300)[0] for process in started]
        assert [process.returncode for process in started] == [0] * count
        return [json.loads(text.splitlines()[-1]) for text in outputs]

    (alone,) = run(1)
    assert run(2) == [alone, alone]
    assert len(np.unique(alone[1]["real"])) > 4 and alone[1]["real"] != alone[1]["other"]
