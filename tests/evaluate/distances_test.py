"""Fréchet and kernel distances against closed forms and a float64 reference."""

import numpy as np
import pytest
import scipy.linalg

from fourdstar_jax.evaluate.distances import (
    frechet_distance,
    frechet_draws,
    kernel_distance,
    kernel_draws,
    middle,
)


def reference(x, y):
    """The usual form, with a matrix's square root."""
    c, d = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c @ d)
    shift = np.square(x.mean(0) - y.mean(0)).sum()
    return float(shift + np.trace(c) + np.trace(d) - 2 * np.trace(root).real), c, d


def features(seed, n, d=12):
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    return mixed + rng.standard_normal(d)


@pytest.mark.parametrize("n, m", [(200, 300), (200, 13), (13, 14)])
def test_frechet_equals_the_reference(n, m):
    x, y = features(0, n), features(1, m)
    wanted, c, d = reference(x, y)
    assert abs(frechet_distance(x, y) - wanted) < 1e-6 * (np.trace(c) + np.trace(d))
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)


def test_frechet_of_fewer_rows_than_features():
    """Two points a set, along axes that cross: the covariances do not meet."""
    x, y = np.zeros((2, 5)), np.zeros((2, 5))
    x[1, 0], y[1, 1] = 2.0, 4.0
    assert frechet_distance(x, y) == pytest.approx(1 + 4 + 2 + 8)
    x, y = features(2, 5), features(3, 4)
    c, d = (np.cov(z, rowvar=False) for z in (x, y))
    values = np.linalg.eigvals(c @ d).real  # of a product of such matrices none is below zero
    wanted = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(c) + np.trace(d)
    wanted -= 2 * np.sqrt(values.clip(0)).sum()
    assert abs(frechet_distance(x, y) - wanted) < 1e-6 * (np.trace(c) + np.trace(d))


def test_equal_sets_are_at_zero_and_a_shift_counts_squared():
    x = features(4, 40)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + 3) == pytest.approx(12 * 9)


def test_kernel_distance_by_hand_and_on_average():
    x, y = np.array([[1.0], [2.0]]), np.array([[0.0], [1.0], [3.0]])
    k = lambda a, b: (a * b + 1) ** 3  # noqa: E731
    within = k(1, 2), (k(0, 1) + k(0, 3) + k(1, 3)) / 3
    between = np.mean([k(a, b) for a in (1, 2) for b in (0, 1, 3)])
    assert kernel_distance(x, y) == pytest.approx(sum(within) - 2 * between)
    rng = np.random.default_rng(5)
    alike = [kernel_distance(*rng.standard_normal((2, 30, 8))) for _ in range(200)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / np.sqrt(200)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_sets_that_are_none_are_refused(distance):
    x = features(6, 5)
    for other, words in (
        (x[:1], "two rows"),
        (x[:, :3], "features of 12 and of 3"),
        (x * np.nan, "finite"),
    ):
        with pytest.raises(ValueError, match=words):
            distance(x, other)


def test_intervals_draw_whole_groups():
    """Of two groups: both twice or one of each, and no row is paired with its own copy."""
    x, y = features(7, 6, d=3), features(8, 6, d=3)
    groups = np.array([0, 0, 0, 1, 1, 1])
    low, high = middle(kernel_draws(x, y, groups))
    apart = [kernel_distance(x[groups == g], y[groups == g]) for g in (0, 1)]
    # of a group that is drawn twice all pairs count but those of a row with itself
    values = []
    for g in (0, 1):
        a, b = x[groups == g], y[groups == g]
        ks = [(p @ q.T / 3 + 1) ** 3 for p, q in ((a, a), (b, b), (a, b))]
        within = sum((4 * k.sum() - 4 * np.trace(k)) / (36 - 12) for k in ks[:2])
        values.append(within - 2 * ks[2].mean())
    np.testing.assert_allclose(values, apart)
    both = kernel_distance(x, y)
    assert low == pytest.approx(min(*values, both)) and high == pytest.approx(max(*values, both))
    low, high = middle(frechet_draws(x, y, groups, resamples=40))
    values = [frechet_distance(np.tile(x[i], (2, 1)), np.tile(y[i], (2, 1)))
              for i in (groups == 0, groups == 1)]  # fmt: skip
    values.append(frechet_distance(x, y))
    assert low == pytest.approx(min(values)) and high == pytest.approx(max(values))
