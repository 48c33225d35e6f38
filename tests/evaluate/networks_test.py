"""Networks by batches: what a clip's frames give together is what they give one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.perceptual import lpips


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_lpips_in_time_is_lpips_of_all_pairs(batch):
    rng = np.random.default_rng(0)
    shapes = lpips.shapes("AlexNet")
    leaves, treedef = jax.tree.flatten(shapes)
    values = [jnp.asarray(rng.random(x.shape, np.float32) - 0.4) for x in leaves]
    networks = Networks(None, batch=batch)
    networks._loaded["lpips_vgg"] = jax.tree.unflatten(treedef, values)
    first, second = (255 * rng.random((5, 32, 40, 3), np.float32) for _ in range(2))
    pairs, *changes = networks.lpips_in_time("lpips_vgg", first, second)
    close = dict(rtol=1e-4)
    np.testing.assert_allclose(pairs, networks.lpips("lpips_vgg", first, second), **close)
    for found, frames in zip(changes, (first, second), strict=True):
        wanted = networks.lpips("lpips_vgg", frames[:-1], frames[1:])
        np.testing.assert_allclose(found, wanted, **close)
    one, *none = networks.lpips_in_time("lpips_vgg", first[:1], second[:1])
    np.testing.assert_allclose(one, pairs[:1], **close)
    assert [x.shape for x in none] == [(0,), (0,)]
