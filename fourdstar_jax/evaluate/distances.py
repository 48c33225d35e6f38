"""Distances of two sets of features: Fréchet (FID, FVD) and kernel (KID), in float64.

A single video's features are no set: protocols say what may be called FVD.
"""

import numpy as np
from jaxtyping import Float

from fourdstar_jax.types import Array


def frechet_distance(first: Float[Array, "n d"], second: Float[Array, "m d2"]) -> float:
    """Squared Fréchet distance of the normal distributions with the sets' means and covariances.

    Heusel et al. 2017 (arXiv:1706.08500), Eq. 6: |m - m'|^2 + tr(C) + tr(C') - 2 tr((C C')^1/2).
    The last trace is the sum of the singular values of X^T X', for C = X X^T, so that no root of a
    nearly singular matrix is taken: sets smaller than their features are no less exact. Covariances
    are divided by n - 1. Raises ValueError for sets of fewer than two rows or of unlike widths.
    """
    first, second = _checked(first, second)
    parts = []
    for x in (first, second):
        parts.append((x - x.mean(axis=0)) / np.sqrt(len(x) - 1))
    between = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    traces = sum(np.square(x).sum() for x in parts)
    # what turns rows leaves the singular values: no matrix is larger than the features' width
    a, b = (np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x for x in parts)
    common = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(between + traces - 2 * common, 0.0))


def kernel_distance(first: Float[Array, "n d"], second: Float[Array, "m d2"]) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / d + 1)^3, without bias.

    The KID of Binkowski et al. 2018 (arXiv:1801.01401) over all rows at once. Equal distributions
    give 0 on average; a value may be below. Raises ValueError as `frechet_distance` does.
    """
    first, second = _checked(first, second)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def _checked(first, second) -> tuple[np.ndarray, np.ndarray]:
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    for name, x in (("first", first), ("second", second)):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"{name} must be [n, d] with two rows or more, not {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} must be finite")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"features of {first.shape[1]} and of {second.shape[1]} numbers")
    return first, second
