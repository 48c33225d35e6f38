"""Density-peaks clustering against an independent float64 implementation, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourdstar_jax import cluster_dpc_knn as exported
from fourdstar_jax.kernels.dpc_knn import (
    add_group,
    cluster_dpc_knn,
    clusters_before,
    empty_peaks,
    find_clusters,
    reference,
)

BEFORE = jax.jit(clusters_before, static_argnames=("k", "num_clusters"))


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
        # As training has it: of g + 2 groups (even and odd), the last one of no account.
        if g + 1 < groups:
            arrays = (y[: end + size].reshape(g + 2, size, *y.shape[1:]) for y in (x, ids, mask))
            before = BEFORE(*arrays, jnp.array([g + 1, 1]), k=k, num_clusters=5)
            for at, name in enumerate(got._fields):
                np.testing.assert_array_equal(before[at][0][:end], got[at][:end], err_msg=name)
            assert (before.assignment[0, end:] == -1).all()


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


BLOBS = np.concatenate(
    [
        np.random.default_rng(1).normal(size=(20, 4)) * 0.05 + centre
        for centre in ([0, 0, 0, 0], [3, 0, 0, 0], [0, 3, 0, 0])
    ]
).astype(np.float32)


def sizes(result):
    """Of the clusters, smallest first; how many tokens are in none."""
    assignment = np.asarray(result.assignment)
    return sorted(np.bincount(assignment[assignment >= 0]).tolist()), int(np.sum(assignment < 0))


def blobs(change=lambda x: x, **options):
    return cluster_dpc_knn(change(BLOBS), **dict(num_clusters=3, k=5) | options)


@pytest.mark.parametrize("offset", [0, 1e2, -1e3, 1e4, 1e5, [1e5, -1e5, 3e4, 0]])
def test_an_offset_changes_nothing(offset):
    got = blobs(lambda x: x + np.float32(offset))
    assert got.valid.all() and sizes(got) == ([20, 20, 20], 0)


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e-3, 1, 100, 1e3, 1e18, 3e19, 1e37])
def test_clusters_of_any_scale(scale):
    got = blobs(lambda x: x * np.float32(scale))
    assert got.valid.all() and sizes(got) == ([20, 20, 20], 0)


@pytest.mark.parametrize("seed", range(5))
def test_rho_depends_on_the_scale_as_defined(seed):
    """At several scales, far from the origin: what is centred must not change the definition."""
    x, ids = sample(seed, 33, 7, 5)
    kw = dict(num_clusters=5, k=3, num_groups=3)
    results = []
    for scale in (0.25, 1, 4):
        moved = np.float32(scale) * x + 100
        order, assignment = naive(moved, ids, np.ones(33, bool), **kw)
        got = cluster_dpc_knn(moved, ids=ids, **kw)
        assert list(np.asarray(got.centers)[np.asarray(got.valid)]) == order
        np.testing.assert_array_equal(got.assignment, assignment)
        results.append(order)
    assert results[0] != results[2] or seed > 0  # the scales do differ


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_hurt_only_themselves(value):
    def broken(x):
        x = x.copy()
        x[7] = value
        x[45, 2] = value
        return x

    mask = np.ones(60, bool)
    mask[[7, 45]] = False
    got, masked = blobs(broken), blobs(mask=mask)
    assert sizes(got) == ([19, 19, 20], 2)
    for a, b in zip(got, masked, strict=True):
        np.testing.assert_array_equal(a, b)
    nothing = blobs(lambda x: x * np.nan)
    assert not nothing.valid.any() and (nothing.assignment == -1).all()


def test_rows_that_are_not_finite_hurt_only_themselves_group_by_group():
    x = jnp.asarray(BLOBS.reshape(2, 30, 4)).at[0, 7].set(jnp.nan).at[1, 15, 2].set(jnp.inf)
    peaks = empty_peaks(60, 4, 1)
    for g in range(2):
        ids = jnp.arange(30 * g, 30 * (g + 1))[:, None]
        peaks = add_group(peaks, x[g], ids, jnp.ones(30, bool), k=5)
    got = find_clusters(peaks, num_clusters=3)
    assert sizes(got) == ([19, 19, 20], 2)
    assert all(np.isfinite(y).all() for y in (peaks.x, peaks.log_densities, peaks.max_distance))


def test_float64_is_kept():
    """Three clusters that lie within one float32 of each other's place."""
    with jax.enable_x64(True):
        exact = BLOBS.astype(np.float64) * 1e-4 + 1e5
        got = cluster_dpc_knn(exact, num_clusters=3, k=5)
        assert sizes(got) == ([20, 20, 20], 0)
        rounded = cluster_dpc_knn(exact.astype(np.float32), num_clusters=3, k=5)
        assert sizes(rounded) != ([20, 20, 20], 0)
        peaks = empty_peaks(60, 4, 1, jnp.float64)
        ids, mask = jnp.arange(60)[:, None], jnp.ones(60, bool)
        peaks = add_group(peaks, jnp.asarray(exact - 1e5), ids, mask, k=5)
        assert {y.dtype for y in (peaks.x, peaks.log_densities, peaks.deltas)} == {
            np.dtype("float64")
        }
        assert sizes(find_clusters(peaks, num_clusters=3)) == ([20, 20, 20], 0)


def test_lists_and_scalars_are_arrays():
    rows = [[0.0, 0], [0.1, 0], [5, 5], [5, 5.1], [9, 0]]
    kw = dict(num_clusters=2, k=2)
    want = cluster_dpc_knn(jnp.asarray(rows), ids=jnp.arange(5)[:, None], **kw)
    got = cluster_dpc_knn(rows, ids=[[0], [1], [2], [3], [4]], mask=True, **kw)
    np.testing.assert_array_equal(got.assignment, want.assignment)
    whole = [[0, 0], [1, 0], [5, 5], [5, 6]]  # whole numbers
    mask = [True, True, True, False]
    got = cluster_dpc_knn([whole, whole], mask=[mask, mask], num_clusters=np.int64(2), k=1)
    assert got.assignment.shape == (2, 4) and (got.assignment[:, 3] == -1).all()
    mixed = cluster_dpc_knn([jnp.zeros(2), jnp.ones(2), [2.0, 0.0]], num_clusters=3, k=1)
    assert mixed.valid.all()


def test_strict_promotion():
    x = jax.random.normal(jax.random.key(0), (2, 12, 3))
    kw = dict(num_clusters=4, k=2, num_groups=2)
    ids, mask = jnp.arange(24).reshape(2, 12, 1) // 2, jnp.arange(24).reshape(2, 12) > 2
    want = cluster_dpc_knn(x, ids=ids, mask=mask, **kw)
    with jax.numpy_dtype_promotion("strict"):
        got = jax.jit(lambda x: cluster_dpc_knn(x, ids=ids, mask=mask, **kw))(x)
        cluster_dpc_knn(x.astype(jnp.bfloat16), **kw)
        add_group(empty_peaks(24, 3, 1), x[0], ids[0], mask[0], k=2)
        gradient = jax.grad(lambda x: jnp.sum(x[0, cluster_dpc_knn(x, **kw).centers[0]]))(x)
    np.testing.assert_array_equal(got.assignment, want.assignment)
    assert float(gradient.sum()) == 4 * 3  # of the gather alone


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(num_groups=5), "num_groups"),
        (dict(num_groups=0), "num_groups"),
        (dict(num_groups=2.0), "num_groups"),
        (dict(num_clusters=13), "num_clusters"),
        (dict(num_clusters=True), "num_clusters"),
        (dict(num_clusters="3"), "num_clusters"),
        (dict(k=7), "k=7"),
        (dict(k=-1), "k=-1"),
        (dict(k=None), "k=None"),
        (dict(x=jnp.ones(12)), "^x must"),
        (dict(x=jnp.ones((12, 0))), "^x must"),
        (dict(x=jnp.ones((12, 3), jnp.int32)), "^x must"),
        (dict(x=np.ones((12, 3), complex)), "^x must"),
        (dict(x=[[1.0, 2.0], [3.0]]), "^x must"),
        (dict(x=None), "^x must"),
        (dict(x="tokens"), "^x must"),
        (dict(ids=jnp.zeros(12, jnp.int32)), "^ids must"),
        (dict(ids=jnp.zeros((12, 0), jnp.int32)), "^ids must"),
        (dict(ids=jnp.zeros((11, 1), jnp.int32)), "^ids must"),
        (dict(ids=jnp.zeros((12, 1))), "^ids must"),
        (dict(mask=jnp.ones(11, bool)), "^mask must"),
        (dict(mask=jnp.ones((12, 1), bool)), "^mask must"),
        (dict(mask=jnp.ones(12)), "^mask must"),
        (dict(mask=[1] * 12), "^mask must"),
    ],
)
def test_bad_arguments_are_named(change, name):
    arguments = dict(x=jnp.ones((12, 3)), num_clusters=2, k=2, num_groups=2) | change
    with pytest.raises(ValueError, match=name):
        cluster_dpc_knn(arguments.pop("x"), **arguments)


def test_sizes_that_are_traced_are_named():
    with pytest.raises(ValueError, match="num_clusters"):
        jax.jit(lambda n: cluster_dpc_knn(jnp.ones((12, 3)), num_clusters=n, k=2))(3)


def test_it_is_public():
    assert exported is cluster_dpc_knn
