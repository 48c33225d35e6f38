"""A count model of tokens: the bar that a trained STAR has to be below.

p(code | codebook, the previous token's code of that codebook in the same row of the image), with
add-one smoothing. It knows the tokenizer's statistics and nothing of text, video or cameras.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Counts(NamedTuple):
    """Counts of each code after each other one; index `vocab` stands for the start of a row."""

    counts: Int[np.ndarray, "K prev vocab"]  # prev = vocab + 1
    row_length: int


def _previous(tokens: Int[np.ndarray, "*b N K"], row_length: int, start: int):
    if tokens.shape[-2] % row_length:
        raise ValueError(f"{tokens.shape[-2]} tokens are not a multiple of {row_length=}")
    rows = tokens.reshape(-1, row_length, tokens.shape[-1])
    previous = np.concatenate([np.full_like(rows[:, :1], start), rows[:, :-1]], axis=1)
    return previous.reshape(tokens.shape)


def fit_counts(tokens: Int[np.ndarray, "*b N K"], *, vocab_size: int, row_length: int) -> Counts:
    """Counts over training tokens, views of N tokens row by row, `row_length` tokens a row.

    N may hold several views. Raises ValueError for ids outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    if tokens.size and not (0 <= tokens.min() and tokens.max() < vocab_size):
        raise ValueError(f"tokens lie in {tokens.min()}..{tokens.max()}, not below {vocab_size=}")
    previous = _previous(tokens, row_length, vocab_size)
    codes = tokens.shape[-1]
    counts = np.zeros((codes, vocab_size + 1, vocab_size), np.int64)
    for k in range(codes):
        np.add.at(counts[k], (previous[..., k].ravel(), tokens[..., k].ravel()), 1)
    return Counts(counts, row_length)


def nll(model: Counts, tokens: Int[np.ndarray, "*b N K"]) -> Float[np.ndarray, "*b N K"]:
    """Negative log-likelihood of every code in nats."""
    tokens = np.asarray(tokens)
    vocab_size = model.counts.shape[-1]
    previous = _previous(tokens, model.row_length, vocab_size)
    codebook = np.arange(tokens.shape[-1])
    seen = model.counts[codebook, previous, tokens]
    total = model.counts.sum(axis=-1)[codebook, previous]
    return np.log(total + vocab_size) - np.log(seen + 1)
