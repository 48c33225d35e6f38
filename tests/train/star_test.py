"""STAR's trainer: the lengths of clips that it draws."""

import collections

import numpy as np

from fourdstar_jax.train import star


def test_some_steps_have_shorter_clips():
    batch = {"tokens": np.zeros((2, 5, 3)), "times": np.zeros((2, 5)), "clip": np.zeros(2)}
    seen = collections.Counter()
    for step in range(400):
        short = star.shortened(batch, 0, step, still=0.1, half=0.3)
        assert short["tokens"].shape[1] == short["times"].shape[1]
        assert short["clip"].shape == (2,)
        seen[short["times"].shape[1]] += 1
        again = star.shortened(batch, 0, step, still=0.1, half=0.3)
        assert again["times"].shape == short["times"].shape
    assert set(seen) == {1, 3, 5} and 20 < seen[1] < 60 and 80 < seen[3] < 160
