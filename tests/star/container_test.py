"""The container: incremental clusters, merging, refinement, empty slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fourdstar_jax import cluster_dpc_knn, nn, sharding
from fourdstar_jax.star.container import (
    Container,
    Group,
    empty_container,
    merge,
    surroundings,
)

B, T, N, K, D, M = 2, 3, 7, 3, 12, 5
BEGUN = np.tile(np.arange(T) > 0, (B, 1))


def build(**changes):
    with sharding.use_mesh(devices=jax.devices()[:1]):
        return nn.build(
            Container, jax.random.key(0), dim=D, num_heads=3, num_slots=M, neighbors=2,
            refine_blocks=2, init=nnx.initializers.normal(0.3), dtype=jnp.float32, **changes,
        )  # fmt: skip


@pytest.fixture(scope="module")
def container():
    return build()


@pytest.fixture(scope="module")
def history():
    """Features that repeat where tokens repeat, the tokens, and that all of them count."""
    tokens = jax.random.randint(jax.random.key(1), (B, T, N, K), 0, 2, jnp.int32)
    table = jax.random.normal(jax.random.key(2), (2, 2, 2, D))
    x = table[tokens[..., 0], tokens[..., 1], tokens[..., 2]]
    return Group(x, tokens, jnp.ones(x.shape[:3], bool))


@jax.jit
def state_of(container, groups):
    """What the container tells every group of what was clustered."""
    return container.tell(container.over_time(groups, somewhere()), jnp.asarray(BEGUN), jnp.float32)


def somewhere():
    """Positional encodings and coordinates of all tokens."""
    return jax.random.normal(jax.random.key(4), (B, T, N, D + 4))


def test_training_clusters_equal_a_run_from_scratch(container, history):
    x, tokens, _ = history
    got = container.cluster_history(history)
    assert not got.valid[:, 0].any() and (got.assignment[:, 0] == -1).all()
    for t in range(1, T):
        want = cluster_dpc_knn(
            x[:, :t].reshape(B, t * N, D), ids=tokens[:, :t].reshape(B, t * N, K),
            num_clusters=M, k=2, num_groups=t,
        )  # fmt: skip
        np.testing.assert_array_equal(got.centers[:, t], want.centers)
        np.testing.assert_array_equal(got.valid[:, t], want.valid)
        np.testing.assert_array_equal(got.assignment[:, t, : t * N], want.assignment)
        assert (got.assignment[:, t, t * N :] == -1).all()


def test_training_and_decoding_cluster_alike(container, history):
    trained = jax.jit(container.cluster_history)(history)
    carry = empty_container(B, T * N, D, K)
    for t in range(T - 1):
        carry, clusters = container.cluster(carry, Group(*(y[:, t] for y in history)))
        jax.tree.map(
            lambda a, b, t=t: np.testing.assert_array_equal(a[:, t + 1], b), trained, clusters
        )
    assert int(carry.filled) == (T - 1) * N


def test_merge_is_the_mean_weighted_by_exp_of_the_score():
    rng = np.random.default_rng(0)
    x, scores = rng.normal(size=(1, 9, 4)), 5 * rng.normal(size=(1, 9)) + 80  # exp(85): large
    assignment = np.array([[0, 1, 2, 0, 1, -1, 0, 2, 2]])
    got = merge(*(jnp.asarray(y, jnp.float32) for y in (x, scores)), jnp.asarray(assignment), 4)
    for m in range(3):
        inside = assignment[0] == m
        w = np.exp(scores[0, inside])
        np.testing.assert_allclose(got[0, m], w @ x[0, inside] / w.sum(), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(got[0, 3], 0)


def test_one_slot_a_token_keeps_every_token(container):
    x = jax.random.normal(jax.random.key(3), (1, 1, N, D))
    c = cluster_dpc_knn(x[:, 0], num_clusters=N, k=2)
    z = merge(x[:, 0], jnp.zeros((1, N)), c.assignment, N)
    np.testing.assert_allclose(z[0], x[0, 0, c.centers[0]], rtol=1e-6)


def reference_states(container, x, assignment, valid):
    """One sample in plain numpy: merge, two blocks of attention with scores on the logits."""

    def norm(y, layer):
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
        return y * np.asarray(layer.scale[...]) + np.asarray(layer.bias[...])

    def gelu(y):
        return np.asarray(jax.nn.gelu(y, approximate=False))

    def linear(layer, y):
        bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
        return y @ np.asarray(layer.kernel[...]) + bias

    def mlp(layer, y):
        return linear(layer.down, gelu(linear(layer.up, y)))

    def scores(block, y):
        return linear(block.score_down, gelu(linear(block.score_up, y)))[:, 0]

    def refine(block, z, x, score, seen):
        y = np.zeros_like(z)
        for h in range(3):
            part = slice(h * D // 3, (h + 1) * D // 3)
            q, k, v = (linear(layer, s)[:, part] for layer, s in zip(
                (block.q, block.k, block.v), (z, x, x), strict=True
            ))  # fmt: skip
            logits = q @ k.T / np.sqrt(D // 3) + score
            weights = np.exp(logits - logits.max()) * seen
            y[:, part] = weights @ v / weights.sum(-1, keepdims=True)
        z = z + linear(block.out, y)
        return z + mlp(block.mlp, norm(z, block.norm2))

    first, second = container.blocks
    score = scores(first, x)
    z = np.zeros((M, D))
    for m in np.flatnonzero(valid):
        w = np.exp(score) * (assignment == m)
        z[m] = w @ x / w.sum()
    z = refine(first, z, x, score, assignment >= 0)
    y = norm(z, second.norm1)
    return refine(second, y, y, scores(second, y), valid)


def test_states_equal_a_plain_implementation(container, history):
    clusters = container.cluster_history(history)
    flat, places = history.x.reshape(B, -1, D), somewhere().reshape(B, T * N, -1)
    got, means = jax.jit(lambda c, *a: c.states(*a))(container, flat, places, clusters)
    for b in range(B):
        for t in range(1, T):
            valid = np.asarray(clusters.valid[b, t])
            assignment = np.asarray(clusters.assignment[b, t])
            want = reference_states(container, np.asarray(flat[b]), assignment, valid)
            np.testing.assert_allclose(got[b, t][valid], want[valid], rtol=1e-4, atol=1e-5)
            alone = [m for m in np.flatnonzero(valid) if (assignment == m).sum() == 1]
            for m in alone:
                place = places[b, clusters.centers[b, t, m]]
                np.testing.assert_allclose(means[b, t, m], place, rtol=1e-5)


def test_empty_slots_hold_the_learned_vector(container, history):
    clusters = container.cluster_history(history)
    out = state_of(container, history).tokens
    empty = container.empty[...]
    np.testing.assert_array_equal(out[:, 0], jnp.broadcast_to(empty, (B, M, D)))
    filled = np.asarray(clusters.valid)
    assert filled[:, 1:].any() and np.isfinite(np.asarray(out)).all()
    assert not (np.abs(np.asarray(out)[filled] - empty) < 1e-6).all(-1).any()


def test_later_groups_do_not_reach_a_state(container, history):
    other = history.x.at[:, 1].add(jax.random.normal(jax.random.key(5), (B, N, D)))
    a, b = (state_of(container, history._replace(x=x)).tokens for x in (history.x, other))
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert (jnp.abs(a[:, 2] - b[:, 2]).max(axis=(1, 2)) > 1e-3).all()


def test_gradient_reaches_scores_and_features(container, history):
    @functools.partial(jax.grad, argnums=(0, 1))
    def grads(container, x):
        groups = history._replace(x=x)
        return jnp.sum(state_of(container, groups).tokens ** 2)

    dcontainer, dx = jax.jit(grads)(container, history.x)
    for block in dcontainer.blocks:
        assert jnp.abs(block.score_up.kernel[...]).max() > 1e-6
    dx = jnp.abs(dx).max(axis=(0, 2, 3))
    assert (dx[:-1] > 1e-6).all() and dx[-1] == 0  # the last group conditions nothing


def test_a_place_is_told_the_state_of_its_cluster(history):
    container = build(inject="both", place=0.2, blank_code=0)
    rays = jax.random.normal(jax.random.key(6), (B, T, N, 6))
    groups = container.group(history.x, history.ids, rays, history.mask)
    blank = np.asarray((history.ids == 0).all(-1))
    np.testing.assert_array_equal(groups.mask, ~blank)
    assert blank[:, :-1].any()

    clusters = container.cluster_history(groups)
    z = container.over_time(groups, somewhere()).z
    got = state_of(container, groups).aligned
    assert len(got) == 3
    for mlp, told in zip(container.aligned, got, strict=True):
        np.testing.assert_array_equal(told[:, 0], 0)  # the first group has no past
        for b, t, j in np.ndindex(B, T, N):
            if t == 0:
                continue
            cluster = int(clusters.assignment[b, t, (t - 1) * N + j])
            assert (cluster < 0) == blank[b, t - 1, j]
            want = container.absent[...] if cluster < 0 else z[b, t, cluster]
            np.testing.assert_allclose(told[b, t, j], mlp(want), rtol=1e-3, atol=1e-5)


def test_a_place_is_told_of_those_around_it():
    """In its own view only, and not over its edges."""
    told = jax.random.normal(jax.random.key(0), (1, 2, 18, D))
    near = np.asarray(surroundings(told, 3)).reshape(1, 2, 2, 3, 3, 3, 3, D)
    told = np.asarray(told).reshape(1, 2, 2, 3, 3, D)
    for row, column, i, j in np.ndindex(3, 3, 3, 3):
        got, y, x = near[:, :, :, row, column, i, j], row + i - 1, column + j - 1
        inside = 0 <= y < 3 and 0 <= x < 3
        np.testing.assert_array_equal(got, told[:, :, :, y, x] if inside else 0)


def test_blank_tokens_are_no_centres():
    """All but M tokens are blank: the M others are the centres."""
    container = build(blank_code=0)
    tokens = jnp.zeros((1, 1, 2 * M, 1), jnp.int32).at[0, 0, 1::2, 0].set(jnp.arange(1, M + 1))
    x = jax.random.normal(jax.random.key(7), (M + 1, D))[tokens[..., 0]]
    group = container.group(x, tokens, jnp.zeros((1, 1, 2 * M, 6)), jnp.ones((1, 1, 2 * M), bool))
    carry = empty_container(1, 2 * M, D, 1)
    _, clusters = container.cluster(carry, Group(*(y[:, 0] for y in group)))
    assert clusters.valid.all()
    np.testing.assert_array_equal(np.sort(clusters.centers[0]), np.arange(1, 2 * M, 2))
    np.testing.assert_array_equal(clusters.assignment[0, ::2], -1)


def test_places_part_what_looks_alike():
    """Two bunches of like tokens: clustered by their rays only where these have a weight."""
    x = jnp.tile(jnp.ones(D), (1, 1, 8, 1)) + 1e-3 * jax.random.normal(jax.random.key(8), (8, D))
    tokens = jnp.arange(8, dtype=jnp.int32)[None, None, :, None]
    rays = jnp.where(jnp.arange(8)[:, None] % 2, 1.0, -1.0) * jnp.ones((1, 1, 8, 6))
    for place in (None, 0.3):
        container = build(place=place)
        group = container.group(x, tokens, rays, jnp.ones((1, 1, 8), bool))
        group = Group(*(y[:, 0] for y in group))
        container.num_slots = 2
        _, clusters = container.cluster(
            empty_container(1, 8, group.x.shape[-1], group.ids.shape[-1]), group
        )
        odd, even = clusters.assignment[0, 1::2], clusters.assignment[0, ::2]
        parted = bool((odd == odd[0]).all() and (even == even[0]).all() and odd[0] != even[0])
        assert parted == (place is not None)


def test_global_density_is_that_of_all_tokens(history):
    container = build(density="global")
    got = container.cluster_history(history)
    for t in range(1, T):
        x, ids = (y[:, :t].reshape(B, t * N, -1) for y in (history.x, history.ids))
        want = cluster_dpc_knn(x, ids=ids, num_clusters=M, k=2)
        np.testing.assert_array_equal(got.centers[:, t], want.centers)
        np.testing.assert_array_equal(got.assignment[:, t, : t * N], want.assignment)


@pytest.mark.parametrize("update", ["all_history", "recursive"])
def test_carrying_gives_the_states_of_training(history, update):
    container = build(inject="both", place=0.2, update=update)
    rays = jax.random.normal(jax.random.key(6), (B, T, N, 6))
    groups = container.group(history.x, history.ids, rays, history.mask)
    want = jax.jit(lambda c, g: c.over_time(g, somewhere()))(container, groups)
    carry = container.start(B, T, N, K)

    @jax.jit
    def step(container, carry, t):
        now = jax.tree.map(lambda y: jax.lax.dynamic_index_in_dim(y, t, 1, False), groups)
        place = jax.lax.dynamic_index_in_dim(somewhere(), t, 1, False)
        return container.read(carry, somewhere(), t), container.update(carry, now, place)

    for t in range(T):
        got, carry = step(container, carry, jnp.int32(t))
        np.testing.assert_array_equal(got.valid[:, 0], want.valid[:, t])
        if t > 0:
            np.testing.assert_array_equal(got.previous[:, 0], want.previous[:, t])
            valid = np.asarray(want.valid[:, t])
            for a, b in ((got.z, want.z), (got.means, want.means)):
                np.testing.assert_allclose(a[:, 0][valid], b[:, t][valid], rtol=1e-4, atol=1e-5)
    assert (want.previous[:, 1:] >= 0).all()


def test_a_recursive_state_reaches_back_by_its_gradient(history):
    """The last group's state depends on the first group only through the one between."""
    container = build(update="recursive")

    def last(x):
        return jnp.sum(container.over_time(history._replace(x=x), somewhere()).z[:, -1] ** 2)

    dx = jnp.abs(jax.jit(jax.grad(last))(history.x)).max(axis=(0, 2, 3))
    assert (dx[:2] > 1e-6).all() and dx[2] == 0


def test_more_slots_than_tokens_is_an_error(container):
    with pytest.raises(ValueError, match="container_slots=5"):
        container.check(3)
    one = Group(jnp.ones((1, 1, 5, D)), jnp.ones((1, 1, 5, K), jnp.int32), jnp.ones((1, 1, 5)) > 0)
    assert container.cluster_history(one).valid.shape == (1, 1, M)


def test_bfloat16_clusters_rounded_features_and_trains_as_it_decodes(history):
    """The clusters of rounded features are those of float32 arithmetic on them, all at once or as
    groups come."""
    with sharding.use_mesh(devices=jax.devices()[:1]):
        container = nn.build(
            Container, jax.random.key(0), dim=D, num_heads=3, num_slots=M, neighbors=2,
            refine_blocks=1, place=0.2, init=nnx.initializers.normal(0.3), dtype=jnp.bfloat16,
        )  # fmt: skip
    x = jax.random.normal(jax.random.key(9), (B, T, N, D))
    rays = jax.random.normal(jax.random.key(6), (B, T, N, 6))
    groups = container.group(x, history.ids, rays, history.mask)
    trained = container.cluster_history(groups, lambda y: y[:, jnp.array([0, 2])])
    exact = groups._replace(x=groups.x.astype(jnp.bfloat16).astype(jnp.float32))
    container.rounded = None
    want = container.cluster_history(exact)
    np.testing.assert_array_equal(trained.centers, want.centers[:, ::2])
    np.testing.assert_array_equal(trained.assignment, want.assignment[:, ::2])
    container.rounded = jnp.bfloat16
    carry = empty_container(B, T * N, D + 6, K + 1)
    carry, _ = container.cluster(carry, Group(*(y[:, 0] for y in groups)))
    _, clusters = container.cluster(carry, Group(*(y[:, 1] for y in groups)))
    np.testing.assert_array_equal(trained.centers[:, 1], clusters.centers)
    np.testing.assert_array_equal(trained.assignment[:, 1], clusters.assignment)


def test_gradients_in_half_precision_are_finite():
    """As wide a head as `small` has, on whatever backend there is; nothing is in a cluster yet in
    the first group, and cuDNN's gradient of such queries was not finite."""
    dim, slots, size = 64, 64, 96
    with sharding.use_mesh(devices=jax.devices()[:1]):
        container = nn.build(
            Container, jax.random.key(0), dim=dim, num_heads=1, num_slots=slots, neighbors=2,
            refine_blocks=2, place=0.2, inject="both", init=nnx.initializers.normal(0.125),
            dtype=jnp.bfloat16,
        )  # fmt: skip
    keys = jax.random.split(jax.random.key(3), 4)
    tokens = jax.random.randint(keys[0], (B, T, size, K), 0, 9, jnp.int32)
    positions = jax.random.normal(keys[2], (B, T, size, dim + 4))
    rays = jax.random.normal(keys[3], (B, T, size, 6))
    begun = jnp.asarray(BEGUN)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(params, x, rest):
        whole = nnx.merge(graphdef, params, rest)
        groups = whole.group(x, tokens, rays, jnp.ones(tokens.shape[:3], bool))
        placed = jnp.concatenate([positions, groups.x[..., dim:]], axis=-1)
        told = whole.tell(whole.over_time(groups, placed), begun, jnp.bfloat16)
        return sum(jnp.sum(jnp.sin(y.astype(jnp.float32))) for y in jax.tree.leaves(told)), told

    graphdef, params, rest = nnx.split(container, nnx.Param, ...)
    grads, _ = gradient(params, jax.random.normal(keys[1], (B, T, size, dim)), rest)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    wrong = [jax.tree_util.keystr(path) for path, y in leaves if not jnp.all(jnp.isfinite(y))]
    assert not wrong
    names = {jax.tree_util.keystr(path): y for path, y in leaves}
    queries = [y for name, y in names.items() if "['q']['kernel']" in name]
    assert len(queries) == 2 and all(jnp.any(y != 0) for y in queries)
