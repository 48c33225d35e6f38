"""What the comparisons with the original PyTorch models share."""

from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
    """How far a block of ours is from the original's, given the original's input."""

    model: str
    block: str
    relative_l2: float
    limit: float


def relative_l2(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape=} is not {theirs.shape=}")
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
