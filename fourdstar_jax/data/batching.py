"""Calls of compiled functions on any number of rows: batches of one size, the last filled up."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped


def in_batches(
    function: Callable[..., Any], arrays: Sequence[Shaped[np.ndarray, "n ..."]], size: int
) -> Shaped[np.ndarray, "n ..."]:
    """`function(*arrays)` by `size` rows at a time, so that one shape is compiled.

    The rows that fill up the last batch are zeros; what becomes of them is left out.
    """
    out = []
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        count = len(parts[0])
        filled = [np.zeros((size, *part.shape[1:]), part.dtype) for part in parts]
        for whole, part in zip(filled, parts, strict=True):
            whole[:count] = part
        out.append(np.asarray(function(*filled))[:count])
    return np.concatenate(out)
