"""Density-peaks clustering against an independent float64 implementation, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import cluster_dpc_knn as exported
from fourdstar_jax.kernels.dpc_knn import (
    add_group,
    cluster_dpc_knn,
    empty_peaks,
    find_clusters,
    reference,
)


def naive(x, ids, mask, *, num_clusters, k, num_groups):
    """The definition by loops, in float64: centres, assignment."""
    size = len(x)
    d = np.sqrt(((x[:, None] - x[None]).astype(np.float64) ** 2).sum(-1) / x.shape[1])
    d[(ids[:, None] == ids[None]).all(-1)] = 0
    group = np.arange(size) // (size // num_groups)
    rho, delta = np.zeros(size), np.zeros(size)
    valid = np.flatnonzero(mask)
    for i in valid:
        near = np.sort([d[i, j] for j in valid if group[j] == group[i]])[:k]
        rho[i] = np.exp(-np.mean(near**2))
    for i in valid:
        denser = [j for j in valid if (rho[j], -j) > (rho[i], -i)]
        delta[i] = min(d[i, j] for j in denser) if denser else d[np.ix_(valid, valid)].max()
    order = sorted(valid, key=lambda i: (-rho[i] * delta[i], i))[:num_clusters]
    order = [i for i in order if delta[i] > 0]
    assignment = np.full(size, -1)
    for i in valid:
        assignment[i] = order.index(i) if i in order else int(np.argmin(d[i, order]))
    return order, assignment


def sample(seed, size, dim, num_ids):
    """Tokens of which several share their ids, and so their features; features and ids."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, num_ids, (size, 2))
    table = rng.normal(size=(num_ids, num_ids, dim)).astype(np.float32)
    return table[ids[:, 0], ids[:, 1]], ids


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition(seed):
    x, ids = sample(seed, 33, 7, 5)
    mask = np.random.default_rng(seed + 100).random(33) > 0.2
    kw = dict(num_clusters=5, k=3, num_groups=3)
    order, assignment = naive(x, ids, mask, **kw)
    got = cluster_dpc_knn(jnp.asarray(x), ids=jnp.asarray(ids), mask=jnp.asarray(mask), **kw)
    assert list(np.asarray(got.centers)[np.asarray(got.valid)]) == order
    np.testing.assert_array_equal(got.assignment, assignment)


@pytest.mark.parametrize("seed", range(3))
def test_group_by_group_equals_all_at_once(seed):
    size, groups, k = 11, 4, 3
    x, ids = (jnp.asarray(y) for y in sample(seed, size * groups, 7, 5))
    mask = jnp.asarray(np.random.default_rng(seed).random(size * groups) > 0.1)
    peaks = empty_peaks(size * groups, 7, 2)
    add = jax.jit(add_group, static_argnames="k")
    for g in range(groups):
        rows = slice(g * size, (g + 1) * size)
        peaks = add(peaks, x[rows], ids[rows], mask[rows], k=k)
        got = find_clusters(peaks, num_clusters=5)
        end = rows.stop
        want = cluster_dpc_knn(
            x[:end], ids=ids[:end], mask=mask[:end], num_clusters=5, k=k, num_groups=g + 1
        )
        np.testing.assert_array_equal(got.centers, want.centers)
        np.testing.assert_array_equal(got.valid, want.valid)
        np.testing.assert_array_equal(got.assignment[:end], want.assignment)
        assert (got.assignment[end:] == -1).all()


def test_batch_axes_are_independent():
    x, ids = sample(0, 2 * 3 * 10, 7, 9)
    x, ids = jnp.asarray(x).reshape(2, 3, 10, 7), jnp.asarray(ids).reshape(2, 3, 10, 2)
    kw = dict(num_clusters=4, k=2, num_groups=2)
    whole = jax.jit(lambda x, ids: cluster_dpc_knn(x, ids=ids, **kw))(x, ids)
    assert whole.centers.shape == (2, 3, 4) and whole.assignment.shape == (2, 3, 10)
    one = cluster_dpc_knn(x[1, 2], ids=ids[1, 2], **kw)
    np.testing.assert_array_equal(whole.assignment[1, 2], one.assignment)


def test_order_of_tokens_changes_only_names():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(23, 5)), jnp.float32)
    order = np.random.default_rng(1).permutation(23)
    a = cluster_dpc_knn(x, num_clusters=4, k=3)
    b = cluster_dpc_knn(x[order], num_clusters=4, k=3)
    np.testing.assert_array_equal(order[np.asarray(b.centers)], a.centers)
    np.testing.assert_array_equal(np.asarray(b.assignment), np.asarray(a.assignment)[order])


def test_as_many_clusters_as_tokens_leaves_each_alone():
    x = jax.random.normal(jax.random.key(0), (13, 5))
    got = cluster_dpc_knn(x, num_clusters=13, k=2)
    assert got.valid.all()
    np.testing.assert_array_equal(got.assignment[got.centers], np.arange(13))


def test_two_blobs_are_split_exactly():
    rng = np.random.default_rng(0)
    blob = np.repeat([0, 1], [7, 10])
    x = np.where(blob[:, None] == 0, -3.0, 3.0) + 0.01 * rng.normal(size=(17, 5))
    got = np.asarray(cluster_dpc_knn(jnp.asarray(x, jnp.float32), num_clusters=2, k=3).assignment)
    assert len(set(got[:7])) == 1 and len(set(got[7:])) == 1 and got[0] != got[-1]


def test_repeated_tokens_take_one_centre_and_the_rest_are_surplus():
    """A white background: 20 of 23 tokens alike. Four different tokens, seven centres."""
    ids = np.zeros((23, 1), int)
    ids[[3, 11, 20], 0] = [1, 2, 3]
    table = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    got = cluster_dpc_knn(jnp.asarray(table[ids[:, 0]]), ids=jnp.asarray(ids), num_clusters=7, k=3)
    assert int(got.valid.sum()) == 4
    centers = np.asarray(got.centers)[np.asarray(got.valid)]
    assert sorted(ids[centers, 0]) == [0, 1, 2, 3]
    np.testing.assert_array_equal(ids[centers[np.asarray(got.assignment)]], ids)
    # All alike: one centre, the token of the smallest index.
    same = cluster_dpc_knn(jnp.ones((6, 5)), ids=jnp.zeros((6, 1), jnp.int32), num_clusters=3, k=2)
    np.testing.assert_array_equal(same.valid, [True, False, False])
    assert same.centers[0] == 0 and (same.assignment == 0).all()


def test_masked_tokens_count_for_nothing():
    x = np.random.default_rng(0).normal(size=(17, 5)).astype(np.float32)
    mask = np.arange(17) % 3 != 0
    kw = dict(mask=jnp.asarray(mask), num_clusters=9, k=4)
    got = cluster_dpc_knn(jnp.asarray(x), **kw)
    assert mask[np.asarray(got.centers)[np.asarray(got.valid)]].all()
    np.testing.assert_array_equal(np.asarray(got.assignment) == -1, ~mask)
    moved = x + 100.0 * ~mask[:, None]
    np.testing.assert_array_equal(cluster_dpc_knn(jnp.asarray(moved), **kw)[2], got.assignment)


def test_fewer_valid_tokens_than_neighbours_average_over_those():
    x = jnp.asarray([[0.0, 0.0], [2.0, 0.0], [9.0, 9.0], [9.0, 8.0]])
    mask = jnp.asarray([True, True, False, False])
    d = reference.distances(x, x, *(jnp.arange(4)[:, None],) * 2)
    np.testing.assert_allclose(reference.log_densities(d, mask, k=3)[:2], [-1.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(num_groups=5), "num_groups"),
        (dict(num_clusters=13), "num_clusters"),
        (dict(k=7), "k=7"),
    ],
)
def test_bad_arguments_are_named(change, name):
    with pytest.raises(ValueError, match=name):
        cluster_dpc_knn(jnp.ones((12, 3)), **(dict(num_clusters=2, k=2, num_groups=2) | change))


def test_it_is_public():
    assert exported is cluster_dpc_knn
