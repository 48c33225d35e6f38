"""Distances of two sets of features: Fréchet (FID, FVD) and kernel (KID), in float64.

A single video's features are no set: protocols say what may be called FVD. Intervals resample
groups of rows, such as the clips of one object.
"""

import numpy as np
from jaxtyping import Float, Shaped

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


def one_video_distance(first: Float[Array, " d"], second: Float[Array, " d"]) -> float:
    """What the usual script computes of single rows: published as FVD, and no distance of sets.

    NumPy before 2.2 took the covariance of one row `[1, d]` to be one number, the variance over its
    d features, so |x - x'|^2 + (s - s')^2 came out; later ones give NaN.
    """
    first, second = (np.asarray(x, np.float64) for x in (first, second))
    spread = first.std(ddof=1) - second.std(ddof=1)
    return float(np.square(first - second).sum() + np.square(spread))


def kernel_distance(first: Float[Array, "n d"], second: Float[Array, "m d2"]) -> float:
    """Squared maximum mean discrepancy with the kernel (x . y / d + 1)^3, without bias.

    The KID of Binkowski et al. 2018 (arXiv:1801.01401) over all rows at once. Equal distributions
    give 0 on average; a value may be below. Raises ValueError as `frechet_distance` does.
    """
    first, second = _checked(first, second)

    def within(x):
        k = _kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return float(within(first) + within(second) - 2 * _kernel(first, second).mean())


def frechet_draws(
    first: Float[Array, "n d"],
    second: Float[Array, "n d"],
    groups: Shaped[np.ndarray, " n"],
    *,
    resamples: int = 100,
    seed: int = 0,
) -> Float[np.ndarray, " resamples"]:
    """The distance of bootstrap samples of groups of rows, which the two sets have in common.

    Rows that are drawn twice lower the rank of a covariance: the draws lie higher than the
    distance, the more so the fewer rows there are. Sets with the same groups are drawn alike: their
    draws go in pairs.
    """
    members = [np.flatnonzero(groups == g) for g in np.unique(groups)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        rows = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        values.append(frechet_distance(np.asarray(first)[rows], np.asarray(second)[rows]))
    return np.array(values)


def kernel_draws(
    first: Float[Array, "n d"],
    second: Float[Array, "n d"],
    groups: Shaped[np.ndarray, " n"],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, " resamples"]:
    """As `frechet_draws`; a row drawn twice is not paired with itself, one alone gives NaN."""
    first, second = _checked(first, second)
    _, places = np.unique(groups, return_inverse=True)
    kernels = [_kernel(*pair) for pair in ((first, first), (second, second), (first, second))]
    rng = np.random.default_rng(seed)
    count = places.max() + 1
    values = []
    for _ in range(resamples):
        w = np.bincount(rng.integers(count, size=count), minlength=count)[places].astype(float)
        pairs = w.sum() ** 2 - np.square(w).sum()
        if pairs == 0:  # one row, drawn every time
            values.append(np.nan)
            continue
        a, b, between = (w @ k @ w for k in kernels)
        a, b = (x - np.square(w) @ np.diagonal(k) for x, k in ((a, kernels[0]), (b, kernels[1])))
        values.append((a + b) / pairs - 2 * between / w.sum() ** 2)
    return np.array(values)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def middle(draws: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The quantiles that 95 % of the draws lie between."""
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


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
