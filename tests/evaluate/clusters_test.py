"""Pictures of the container's clusters."""

import numpy as np
import pytest
from PIL import Image

from fourdstar_jax.evaluate import clusters

S, M = 24, 4


def found():
    rng = np.random.default_rng(0)
    assignment = np.arange(S) % M
    assignment[:3] = -1
    features = 10 * np.eye(8)[assignment % M] + rng.normal(size=(S, 8))
    return clusters.Found(features, assignment, np.arange(4, 8), np.array([1, 1, 1, 0], bool))


def test_two_dimensions_keep_groups_apart():
    one = found()
    for name, points in clusters.flat(one.features).items():
        a, b = points[3::M], points[4::M]
        assert np.ptp(a, axis=0).max() < np.linalg.norm(a.mean(axis=0) - b.mean(axis=0)), name
    assert one.occupancy.tolist() == [5, 5, 5]


def test_maps_have_the_colour_of_each_place():
    painted = clusters.paint(found(), np.ones((3, 2, 4, 4, 3)), grid=2)
    table = np.concatenate([clusters.colours(M), [clusters.NONE]]) / 255
    assert painted.shape == (3, 2, 4, 4, 3)
    np.testing.assert_allclose(painted[0, 0, :2, :2], np.full((2, 2, 3), 0.5 + 0.5 * table[-1]))
    np.testing.assert_allclose(painted[2, 1, 3, 3], 0.5 + 0.5 * table[3])
    assert len({tuple(c) for c in clusters.colours(64)}) == 64


def test_a_picture_of_a_clip(tiny_bundle, data_dir, tmp_path):
    path = tmp_path / "clusters.png"
    one = clusters.write(tiny_bundle, data_dir, path, split="train")
    assert one.valid.any() and one.assignment.max() < len(one.valid)
    with Image.open(path) as picture:
        assert picture.width == 2 * clusters.PANEL
    with pytest.raises(ValueError, match="train has no clip 99"):
        clusters.write(tiny_bundle, data_dir, path, split="train", clip=99)
    with pytest.raises(ValueError, match="must end in .png"):
        clusters.write(tiny_bundle, data_dir, tmp_path / "x.txt")
