"""What is measured of free samples: against copying, and from picture to picture."""

import jax
import jax.numpy as jnp
import numpy as np

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
