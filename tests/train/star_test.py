"""STAR's trainer: wrong codes and lengths of clips that it draws."""

import collections

import jax
import numpy as np

from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.train import star


def test_a_blank_code_is_taken_for_no_other_and_no_other_for_it():
    books = jax.random.normal(jax.random.key(0), (3, 9, 4))
    near = star.near_codes(books, 4, blank_code=0)
    assert near.shape == (3, 9, 4)
    np.testing.assert_array_equal(near[:, 0], 0)
    assert (near[:, 1:] > 0).all() and not (near == np.arange(9)[:, None])[:, 1:].any()
    np.testing.assert_array_equal(star.near_codes(books, 4), quantize.near_codes(books, 4))
    tokens = jax.random.randint(jax.random.key(2), (2, 3, 8, 3), 0, 9)
    wrong = quantize.corrupt(jax.random.key(1), tokens, near, 1.0)
    np.testing.assert_array_equal(wrong == tokens, tokens == 0)


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
