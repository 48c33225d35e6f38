"""`consistent4d-legacy` against the original script, run with NumPy 1.26, SciPy 1.13, PyTorch 2.14.

Its `evaluation/compute_fvd.py` (read_video_frames, InceptionI3d in eval mode, fid_from_feats) on
the CPU, with the float16 weights of I3D that are released here and `clip` written as PNG.
"""

import numpy as np
import pytest

from fourdstar_jax.evaluate.distances import one_video_distance
from fourdstar_jax.evaluate.networks import Networks
from fourdstar_jax.evaluate.protocols import ONE_VIDEO
from fourdstar_jax.evaluate.resizing import resized


def clip(seed):
    """3 frames of 60x40 pixels."""
    y, x = np.mgrid[0:40, 0:60]
    frames = []
    for t in range(3):
        r = 0.5 + 0.5 * np.sin((x + (6 + 3 * seed) * t) / (9 + seed))
        g = 0.5 + 0.5 * np.cos((y - 4 * t) / (7 + 2 * seed))
        b = (x + y + 2 * t * seed) % 100 / 99
        frames.append(np.stack([r, g, b], axis=-1))
    return np.rint(np.stack(frames) * 255).astype(np.uint8)


def test_the_closed_form_on_given_features():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0, 4, (1, 400))[0], rng.normal(1, 3, (1, 400))[0]
    assert one_video_distance(first, second) == pytest.approx(11168.202138745117, rel=1e-9)
    assert one_video_distance(first, first) == 0


def test_clips(released_weights):
    networks = Networks(released_weights("i3d").parent)
    logits = [
        networks.logits(resized(clip(seed), ONE_VIDEO.resize), pool_frames=1) for seed in (0, 1)
    ]
    for found, start, norm in zip(
        logits,
        ([-4.6117325, 8.281492, 3.601527], [-1.1045563, 6.747074, 3.8260617]),
        (116.97027, 115.25561),
        strict=True,
    ):
        np.testing.assert_allclose(found[:3], start, rtol=1e-4)
        assert np.linalg.norm(found) == pytest.approx(norm, rel=1e-5)
    assert one_video_distance(*logits) == pytest.approx(562.7558427565689, rel=1e-4)
