"""SSIM against its definition, window by window."""

import jax
import numpy as np
import pytest

from fourdstar_jax.perceptual.ssim import ssim


def by_windows(x, y):
    """SSIM of one picture [h, w, c] from the paper's equations 13 to 16."""
    place = np.arange(11) - 5
    window = np.exp(-(place[:, None] ** 2 + place**2) / (2 * 1.5**2))
    window = (window / window.sum())[..., None]
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            ma, mb = (np.sum(window * p, axis=(0, 1)) for p in (a, b))
            va, vb = np.sum(window * (a - ma) ** 2, (0, 1)), np.sum(window * (b - mb) ** 2, (0, 1))
            cov = np.sum(window * (a - ma) * (b - mb), axis=(0, 1))
            value = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4)
            values.append(value / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return np.mean(values)


def test_equals_its_definition():
    rng = np.random.default_rng(0)
    truth = rng.random((2, 3, 15, 17, 3)).astype(np.float32)
    images = np.clip(truth + rng.normal(0, 0.2, truth.shape), 0, 1).astype(np.float32)
    found = jax.jit(ssim)(images, truth)
    wanted = [
        [by_windows(a, b) for a, b in zip(*row, strict=True)]
        for row in zip(images, truth, strict=True)
    ]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(ssim(truth, truth), 1, atol=1e-6)


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(ValueError, match="pictures of 17x10 pixels; SSIM needs 11"):
        ssim(np.zeros((10, 17, 3), np.float32), np.zeros((10, 17, 3), np.float32))
