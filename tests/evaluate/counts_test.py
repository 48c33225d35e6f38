"""The count model: exact probabilities on a sequence that can be counted by hand."""

import numpy as np
import pytest

from fourdstar_jax.evaluate import counts


def test_probabilities_are_those_counted_by_hand():
    tokens = np.array([[0, 1, 1], [0, 1, 2]]).reshape(1, 6, 1)  # two rows of three
    model = counts.fit_counts(tokens, vocab_size=3, row_length=3)
    nll = counts.nll(model, np.array([0, 1, 2]).reshape(3, 1))
    # row start: 0 twice of 2; after 0: 1 twice of 2; after 1: 1 and 2 once each
    np.testing.assert_allclose(np.exp(-nll[:, 0]), [3 / 5, 3 / 5, 2 / 5])


def test_probabilities_sum_to_one_for_every_codebook():
    tokens = np.random.default_rng(0).integers(0, 5, (7, 2, 6, 3))
    model = counts.fit_counts(tokens, vocab_size=5, row_length=3)
    first = np.broadcast_to(np.arange(5)[:, None, None], (5, 3, 3))
    total = np.exp(-counts.nll(model, first))[:, 0].sum(axis=0)
    np.testing.assert_allclose(total, 1)
    assert not np.allclose(model.counts[0], model.counts[1])


def test_bad_tokens_are_named():
    with pytest.raises(ValueError, match="vocab_size=3"):
        counts.fit_counts(np.full((4, 1), 3), vocab_size=3, row_length=2)
    with pytest.raises(ValueError, match="row_length=3"):
        counts.fit_counts(np.zeros((4, 1), int), vocab_size=3, row_length=3)
