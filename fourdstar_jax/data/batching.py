"""Calls of compiled functions on any number of rows: batches of one size, the last filled up."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

Rows = Sequence[Shaped[np.ndarray, "n ..."]]


def filled_batches(arrays: Rows, size: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """`size` rows at a time of every array, and how many of them are rows of theirs.

    The rows that fill up the last batch are zeros.
    """
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        count = len(parts[0])
        filled = [np.zeros((size, *part.shape[1:]), part.dtype) for part in parts]
        for whole, part in zip(filled, parts, strict=True):
            whole[:count] = part
        yield count, filled


def in_batches(
    function: Callable[..., Any], arrays: Rows, size: int
) -> Shaped[np.ndarray, "n ..."]:
    """`function(*arrays)` by `size` rows at a time, so that one shape is compiled.

    What becomes of the zeros that fill up the last batch is left out.
    """
    batches = filled_batches(arrays, size)
    return np.concatenate([np.asarray(function(*filled))[:count] for count, filled in batches])
