"""PSNR, and confidence intervals by bootstrap over clips."""

import numpy as np
from jaxtyping import Float

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
    values: Float[Array, " n"], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of one value a clip and its percentile bootstrap interval: (mean, low, high)."""
    values = np.asarray(values, np.float64)
    if values.size < 2:
        raise ValueError(f"values: an interval needs two clips or more, not {values.size}")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(values.size, size=(resamples, values.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(values.mean()), float(low), float(high)
