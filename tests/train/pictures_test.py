"""The sheet of pictures that the 4D VQ-VAE's trainer writes."""

import numpy as np
from PIL import Image

from fourdstar_jax.train import pictures


def test_columns_and_shades(tmp_path):
    """Truth, coarse, corrected, depth and flow from left to right, a view a row, six at most."""
    shape = (4, 2, 8, 8)
    depth = np.full((*shape, 1), pictures.DEPTHS[0])
    alpha = np.ones((*shape, 1))
    alpha[..., 4:, :, :] = 0
    drawn = {name: np.full((*shape, 3), i / 4) for i, name in enumerate(("truth", "coarse"))}
    drawn |= {"corrected": np.full((*shape, 3), 1.5), "depth": depth, "alpha": alpha}
    path = tmp_path / "some" / "step.png"
    pictures.save(path, pictures.sheet(drawn))
    with Image.open(path) as picture:
        found = np.asarray(picture)
    assert found.shape == (6 * 8, 4 * 8, 3)
    row = found[:8].reshape(8, 4, 8, 3)
    assert np.all(row[:, 0] == 0) and np.all(row[:, 1] == 64) and np.all(row[:, 2] == 255)
    assert np.all(row[:4, 3] == 0) and np.all(row[4:, 3] == 255)  # near is black, nothing white
    drawn["flow"] = np.zeros((*shape, 2))
    assert pictures.sheet(drawn).shape == (6 * 8, 5 * 8, 3)


def test_samples_stand_below_the_truth():
    truth = np.broadcast_to(np.arange(5.0)[:, None, None, None, None] / 8, (2, 5, 3, 8, 8, 3))
    found = pictures.samples_sheet(truth, truth + 0.5).reshape(2, 2, 8, 3, 3, 8, 3)
    for side in (0, 1):
        shades = found[:, side, :, :, :, 0, 0]  # of clips, rows, timesteps 1, 3 and 5, views
        np.testing.assert_allclose(shades[0, 0].T[0] * 8, np.array([0, 2, 4]) + 4 * side)
        assert (shades == shades[:1, :1, :, :1]).all()


def test_flow_has_the_hue_of_its_direction():
    most = pictures.FASTEST * 8
    flow = np.zeros((1, 8, 2))
    flow[0, :4] = [[most, 0], [0, most], [-2 * most, 0], [most / 2, 0]]
    found = pictures.flow_colours(flow)[0]
    np.testing.assert_allclose(found[0], [1, 0, 0], atol=1e-6)  # right
    np.testing.assert_allclose(found[1], [0.5, 1, 0], atol=1e-6)  # down
    np.testing.assert_allclose(found[2], [0, 1, 1], atol=1e-6)  # left, no stronger than the most
    np.testing.assert_allclose(found[3], [1, 0.5, 0.5], atol=1e-6)  # half as fast
    np.testing.assert_allclose(found[4:], 1)
