"""PSNR, and confidence intervals by bootstrap over clips."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Shaped

from fourdstar_jax.types import Array


def psnr(
    images: Float[Array, "*b h w c"],
    targets: Float[Array, "*b h w c"],
    masks: Float[Array, "*b h w 1"] | None = None,
) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1], over all of them together.

    With `masks` (weights in [0, 1]) only the pixels inside count. Identical images give inf.
    """
    error = np.square(np.asarray(images, np.float64) - np.asarray(targets, np.float64))
    weights = np.ones_like(error) if masks is None else np.broadcast_to(masks, error.shape)
    mse = float((weights * error).sum() / weights.sum())
    return float("inf") if mse == 0 else -10 * float(np.log10(mse))


def bootstrap_interval(
    values: Float[Array, " n"],
    *,
    over: Float[Array, " n"] | None = None,
    groups: Shaped[np.ndarray, " n"] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Mean of one value a clip and its percentile bootstrap interval: (mean, low, high).

    With `over` it is the ratio of the two means. With `groups`, such as the clips' objects, whole
    groups are drawn: values of one group are not independent. Raises ValueError for fewer than two
    clips or groups.
    """
    values = np.asarray(values, np.float64)
    if groups is None:
        groups = np.arange(values.size)
    names, places = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"values: an interval needs two clips or more, not {len(names)}")
    sums = np.bincount(places, values)
    parts = np.bincount(places, np.ones_like(values) if over is None else np.asarray(over))
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / parts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(sums.sum() / parts.sum()), float(low), float(high)


def by_object(
    values: Sequence[float] | Float[Array, " n"], objects: Shaped[np.ndarray, " n"]
) -> Float[np.ndarray, " m"]:
    """The mean of each object's clips: clips of one object are not independent of each other."""
    values = np.asarray(values, np.float64)
    return np.array([values[objects == name].mean() for name in np.unique(objects)])
