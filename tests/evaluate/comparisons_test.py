"""Free comparisons: the card, what is nearest, ratios over objects."""

import numpy as np
import pytest

from fourdstar_jax import geometry
from fourdstar_jax.evaluate import comparisons, metrics
from fourdstar_jax.perceptual import lpips as perceptual

SIZE = 32
RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def mesh():
    """None, as for users."""


def test_a_card_is_itself_nothing_and_mirrored():
    cameras = geometry.Rig((0.0, 60.0, 90.0, 180.0), 8.0).cameras(SIZE)
    image = np.ones((SIZE, SIZE, 3))
    image[8:24, 9:23] = RNG.random((16, 14, 3))
    mask = (image < 1).all(axis=-1, keepdims=True).astype(float)
    images, masks = comparisons.flat_card(image, mask, cameras)
    np.testing.assert_allclose(images[0], image, atol=1e-4)
    np.testing.assert_allclose(masks[3], mask[:, ::-1], atol=1e-4)
    np.testing.assert_allclose(images[3], image[:, ::-1], atol=1e-4)
    assert masks[2].max() == 0 and images[2].min() == 1
    # half as wide from 60 degrees, but for the perspective
    assert masks[1].sum() == pytest.approx(mask.sum() / 2, rel=0.15)


def test_the_nearest_clip_and_retrieval():
    """By colours over the pixels of either mask: white around the object does not count."""
    images = RNG.random((5, 2, 1, 8, 8, 3)).astype(np.float32)
    masks = (RNG.random((5, 2, 1, 8, 8, 1)) > 0.5).astype(np.float32)
    images = 1 - masks * (1 - images)
    order = np.array([3, 0, 4])
    noisy = (images + 0.02 * masks * RNG.random(images.shape))[order]
    train = {
        "input_images": np.rint(255 * images).astype(np.uint8),
        "input_masks": np.rint(255 * masks).astype(np.uint8),
        "clip": np.arange(5),
    }
    clips = {"images": noisy.astype(np.float32), "masks": masks[order]}
    np.testing.assert_array_equal(comparisons.nearest_clips(None, clips, train), order)
    one, other = (comparisons._vectors(None, images[i : i + 1], masks[i : i + 1]) for i in (0, 1))
    union = np.maximum(masks[0], masks[1]).sum()
    wanted = np.square(images[0] - images[1]).sum() / union
    np.testing.assert_allclose(one.distances(other), [[wanted]], rtol=1e-4)
    made = {i: noisy[k] for k, i in enumerate(order.tolist())} | {1: images[2]}
    found = comparisons.retrieved(None, made, images, masks)
    assert found == {3: True, 0: True, 4: True, 1: False}


def test_lpips_is_a_distance_of_vectors(released_weights):
    network = perceptual.load(released_weights("lpips_alexnet"))
    a, b = RNG.random((2, 2, 32, 32, 3)).astype(np.float32)
    vectors = [np.asarray(network.vectors(x), np.float64) for x in (a, b)]
    found = np.square(vectors[0] - vectors[1]).sum(axis=1)
    np.testing.assert_allclose(found, network(a, b), rtol=1e-4)


def test_ratios_are_of_means_over_objects():
    objects = np.array(["a", "a", "b"])
    rows = {
        0: {"flow": 1.0, "true_flow": 2.0, "psnr": 10.0},
        1: {"flow": 3.0, "true_flow": 2.0, "psnr": 20.0},
        2: {"flow": 4.0, "true_flow": 6.0},
    }
    found = comparisons.summary(rows, objects)
    assert found["flow_ratio"]["value"] == pytest.approx((2 + 4) / (2 + 6))
    assert found["flow_ratio"]["interval_95"] == pytest.approx([4 / 6, 1])
    assert found["psnr"] == {"value": 15, "interval_95": None, "objects": 1, "clips": 2}
    assert "flow" not in found
    still = {i: row | {"true_flow": 0.0} for i, row in rows.items()}
    assert "flow_ratio" not in comparisons.summary(still, objects)
    assert metrics.bootstrap_interval(np.array([1.0, 3.0]), over=np.array([2.0, 2.0]))[0] == 1
