"""The Spatial-Temporal Container: the state that groups 1 to t-1 leave for group t (paper 3.2.2).

For each timestep: cluster the token features of all past groups by density peaks, merge each
cluster with weights exp(score), refine the merged features by attention over the tokens. The steps
follow the similar-token merger of UMIFormer (github.com/GaryZhu1996/UMIFormer, the first author's
group), whose order of operations the paper's text matches; it normalises the features first, and
the merge, the keys and values and the residual all see the normalised ones.

Clustering has no gradient. Decoding calls `container_update` as groups come; training clusters all
histories at once (`dpc_knn.clusters_before`), or scans `container_update` over the groups where
these are not the same. What follows (`Container.states`) has a gradient, into the features and the
scores.

The state conditions a group in two ways ("integrated into STAR via MLPs" leaves it open): as tokens
to attend to, and by place: what a place of group t is told is the state of the cluster that it
belonged to at t - 1. Without places a state is a bag, and a bag tells next to nothing.
"""

import functools
import math
import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import nn, sharding
from fourdstar_jax.kernels import dpc_knn
from fourdstar_jax.kernels.dpc_knn import Clusters, Peaks
from fourdstar_jax.star.embed import vector


class Group(NamedTuple):
    """The tokens of one timestep (or of T of them), as they are clustered."""

    x: Float[Array, "B *T N C"]  # normalised features; with `place` their weighed rays behind them
    ids: Int[Array, "B *T N K"]  # equal for those at distance 0: tokens; with `place` their number
    mask: Bool[Array, "B *T N"]  # False: in no cluster, and nobody's neighbour


class Merged(NamedTuple):
    """The clusters of what was before a group (or each of G), merged and refined."""

    z: Float[Array, "B *G M D"]
    means: Float[Array, "B *G M C"]  # of positional encodings, coordinates and weighed rays
    valid: Bool[Array, "B *G M"]
    previous: Int[Array, "B *G N"]  # cluster of each place of the group before; -1: none


class State(NamedTuple):
    """What the past tells each of G groups."""

    tokens: Float[Array, "B G M D"]  # to attend to; M is 0 without `tokens` injected
    coordinates: Float[Array, "B G M C"]  # of the tokens
    aligned: list[Float[Array, "B G N D"]]  # to add to the slots, for the layers of `INJECTED`


MOST_WEIGHTS = 2**27  # of clusters and tokens at once, where they lie in memory: 512 MB as float32
# The score of a key that is not to be seen: no weight beside others, in float32 too. Where nothing
# is seen it is the log-sum-exp, and cuDNN has had gradients of NaN below -88.7 (pytorch#196678).
# With -1e4 training at `small` was not finite on an H200; with this 200 steps were.
HIDDEN = -64.0
INJECTED = (0, 1 / 3, 2 / 3)  # of the depth: MVAR's places for its condition MLPs
Inject = Literal["tokens", "aligned", "both", "none"]
Density = Literal["group", "global"]
Update = Literal["all_history", "recursive"]
# What decoding carries from group to group: the tokens so far and their clusters, or the state.
Carry = tuple[Peaks, Clusters] | Merged


def empty_container(batch: int, num_tokens: int, dim: int, num_ids: int) -> Peaks:
    """The carry before the first group, with room for `num_tokens`."""
    peaks = dpc_knn.empty_peaks(num_tokens, dim, num_ids)
    many = jax.tree.map(lambda y: jnp.broadcast_to(y, (batch, *y.shape)), peaks)
    return many._replace(filled=peaks.filled)


# All samples of a batch have had the same number of groups.
_AXES: Any = Peaks(*[0] * (len(Peaks._fields) - 1), filled=None)  # pyright: ignore


@functools.partial(jax.jit, static_argnames=("k", "num_clusters", "density", "rounded"))
def container_update(
    carry: Peaks,
    group: Group,
    *,
    k: int,
    num_clusters: int,
    density: Density = "group",
    rounded: Any = None,
) -> tuple[Peaks, Clusters]:
    """Takes a group in and clusters all tokens so far. Carries no gradient.

    `density` says among which tokens the k nearest are: those of a token's own timestep, as the
    paper has it, or all so far, which starts anew with every group. For `rounded` see
    `dpc_knn.reference.squared_distances`; a density among all has nothing of it.
    """
    x = jax.lax.stop_gradient(group.x).astype(jnp.float32)

    def one(peaks, x, ids, mask):
        peaks = dpc_knn.add_group(peaks, x, ids, mask, k=k, rounded=rounded)
        if density == "group":
            found = dpc_knn.find_clusters(peaks, num_clusters=num_clusters, rounded=rounded)
            return peaks, found
        tokens = peaks.x, peaks.ids, peaks.mask
        return peaks, dpc_knn.cluster(*tokens, num_clusters=num_clusters, k=k, num_groups=1)

    return jax.vmap(one, in_axes=(_AXES, 0, 0, 0), out_axes=(_AXES, 0))(
        carry, x, group.ids, group.mask
    )


def merge(
    x: Float[Array, "B S C"], scores: Float[Array, "B S"], assignment: Int[Array, "B S"], size: int
) -> Float[Array, "B M C"]:
    """Means over the clusters with weights exp(score); 0 for an empty cluster.

    Weights are by token, not by cluster and token: of these there are many, and each token is in
    one cluster at most.
    """
    member = jax.nn.one_hot(assignment, size, dtype=jnp.float32)  # [B, S, M]; none of -1

    def own(by_cluster):  # [B, M] to [B, S]
        return jnp.take_along_axis(by_cluster, jnp.maximum(assignment, 0), axis=1)

    largest = jax.vmap(lambda s, a: jax.ops.segment_max(s, a, size))(scores, assignment)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(jnp.where(assignment >= 0, scores - own(largest), -jnp.inf))
    total = jnp.einsum("bsm,bs->bm", member, weights)
    weights = weights / jnp.maximum(own(total), 1e-9)
    return jnp.einsum("bsm,bsc->bmc", member, weights[..., None] * x.astype(jnp.float32))


class RefineBlock(nnx.Module):
    """Attention of merged tokens over tokens, scores added to the logits; then a feed-forward."""

    def __init__(self, dim: int, num_heads: int, *, init, out_init=None, dtype, rngs: nnx.Rngs):
        out_kw = nn.CommonInit(init=out_init or init, dtype=dtype, rngs=rngs)
        kw = nn.CommonInit(init=init, dtype=dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        # Without biases: both uses of the score are blind to a constant.
        self.score_up = nn.linear(dim, max(dim // 4, 1), ("embed", "mlp"), **kw)
        self.score_down = nn.linear(max(dim // 4, 1), 1, ("mlp", None), **kw)
        self.q = nn.linear(dim, dim, ("embed", "heads"), **kw)
        self.k = nn.linear(dim, dim, ("embed", "heads"), **kw)
        self.v = nn.linear(dim, dim, ("embed", "heads"), **kw)
        self.out = nn.linear(dim, dim, ("heads", "embed"), use_bias=True, **out_kw)
        self.norm2 = nnx.LayerNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.mlp = nn.Mlp(dim, 4 * dim, dim, approximate=False, **out_kw)
        self.num_heads = num_heads

    def scores(self, x: Float[Array, "B S D"]) -> Float[Array, "B S"]:
        hidden = nnx.gelu(self.score_up(x), approximate=False)
        return self.score_down(hidden)[..., 0].astype(jnp.float32)

    def keys_values(
        self, x: Float[Array, "B S D"], scores: Float[Array, "B S"], seen: Bool[Array, "B S"]
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S H E"]]:
        """Keys with the score as one more channel, so that any attention can be used.

        A key that is not `seen` has a score that leaves it no weight. Both are padded to a multiple
        of 8 channels, which fused attention asks for.
        """
        scores = jnp.where(seen, scores, HIDDEN)
        heads = (*x.shape[:2], self.num_heads, -1)
        k, v = self.k(x).reshape(heads), self.v(x).reshape(heads)
        pad = -k.shape[-1] % 8 or 8
        score = jnp.broadcast_to(scores[:, :, None, None], (*k.shape[:3], 1)).astype(k.dtype)
        k = jnp.concatenate([k, score], axis=-1)
        k = jnp.pad(k, ((0, 0), (0, 0), (0, 0), (0, pad - 1)))
        return k, jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, pad)))

    def __call__(
        self,
        z: Float[Array, "B M D"],
        keys_values: tuple[Float[Array, "B S H E"], Float[Array, "B S H E"]],
        lengths: Int[Array, " B"] | None,
        places: Float[Array, "B M D"] | None = None,
    ) -> Float[Array, "B M D"]:
        """Refines z, whose queries carry `places`, by the first `lengths` keys, or all."""
        k, v = keys_values
        q = self.q(z if places is None else z + places)
        q = q.reshape(*z.shape[:2], self.num_heads, -1)
        head_dim = q.shape[-1]
        scale = head_dim**-0.5
        # The query's channel against the score: scale * (1 / scale) * score = score.
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - head_dim)))
        q = q.at[..., head_dim].set(1 / scale)
        y = nn.attend(q, k, v, lengths=lengths, scale=scale)
        y = y[..., :head_dim].reshape(*z.shape)
        z = z + self.out(y)
        return z + self.mlp(self.norm2(z))


def surroundings(told: Float[Array, "B G N D"], grid: int) -> Float[Array, "B G N D9"]:
    """What each place is told, with what the eight around it are, zero beyond the edges.

    N are views of `grid` x `grid` places, one after another. Where something moves, what is at a
    place was beside it before.
    """
    x = told.reshape(*told.shape[:2], -1, grid, grid, told.shape[-1])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    near = [x[..., i : i + grid, j : j + grid, :] for i in range(3) for j in range(3)]
    return jnp.concatenate(near, axis=-1).reshape(*told.shape[:3], -1)


def aligned_mlps(dim: int, around: int | None, **kw: Any) -> nnx.List:
    """For each of `INJECTED`: the state by place, with its `surroundings` if `around`, to add."""
    width = dim if around is None else 9 * dim
    return nnx.List([nn.Mlp(width, dim, dim, use_bias=False, **kw) for _ in INJECTED])


class Container(nnx.Module):
    """The Spatial-Temporal Container: the state of all groups before a group.

    It comes out as tokens to attend to, and by place. A token is an MLP of the refined feature,
    plus the mean positional encoding of the cluster (merging lost where and when its tokens were),
    plus a segment vector. Slots without a cluster (before the first group, or when fewer tokens
    differ) hold one learned vector and stay visible, so that the attention mask is the same for
    every group. By place, a state goes through a two-layer MLP for each of the layers it is added
    at; a place that was in no cluster at t - 1, being blank, has a learned vector there, and before
    the first group nothing is added.

    The first refinement block attends to the tokens, the next ones to the merged features
    themselves, which is what the public merger's second block amounts to when both have the same
    number of centres.

    Training calls `over_time`; decoding calls `start`, then `update` and `read` for each group.
    Both end in `tell`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_slots: int,
        neighbors: int,
        refine_blocks: int,
        inject: Inject = "tokens",
        place: float | None = None,
        blank_code: int | None = None,
        density: Density = "group",
        update: Update = "all_history",
        around: int | None = None,
        init,
        out_init=None,
        dtype,
        rngs: nnx.Rngs,
    ):
        """`num_slots` clusters by the `neighbors` nearest tokens.

        `place` is the weight of a token's ray beside its feature in clustering, which makes a
        cluster a patch of one part; queries, keys and values of the refinement then carry the
        place, too. None: neither. Tokens with `blank_code` in every codebook are in no cluster. For
        `density` see `container_update`. `update` says what is clustered for group t: the tokens of
        all groups before, or the state for t - 1 and the tokens of t - 1. With `around`, tokens a
        side of a view, the state by place comes with those of the places around it.

        Raises ValueError for options there are not.
        """
        if refine_blocks < 1:
            raise ValueError(f"{refine_blocks=} must be at least 1")
        for value, choices in ((inject, Inject), (density, Density), (update, Update)):
            if value not in typing.get_args(choices):
                raise ValueError(f"container: {value!r} must be one of {typing.get_args(choices)}")
        kw = nn.CommonInit(init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [RefineBlock(dim, num_heads, out_init=out_init, **kw) for _ in range(refine_blocks)]
        )
        self.as_tokens, self.by_place = inject in ("tokens", "both"), inject in ("aligned", "both")
        kw = nn.Common(dtype=dtype, rngs=rngs)
        if self.as_tokens:
            self.mlp = nn.Mlp(dim, dim, dim, use_bias=False, **kw)
            self.segment = vector(rngs.params(), dim)
            self.empty = vector(rngs.params(), dim)
        if self.by_place:
            self.aligned = aligned_mlps(dim, around, **kw)
            absent = None if blank_code is None else vector(rngs.params(), dim, std=1.0)
            self.absent = absent
        self.dim, self.num_slots, self.neighbors = dim, num_slots, neighbors
        self.around = around
        self.place, self.blank_code = place, blank_code
        self.density: Density = density
        self.recursive = update == "recursive"
        self.rounded = jnp.bfloat16 if dtype == jnp.bfloat16 else None  # as its features were made

    def check(self, num_tokens: int):
        """Raises ValueError if the container has more slots than there are tokens to fill them."""
        if self.num_slots > num_tokens:
            raise ValueError(
                f"container_slots={self.num_slots} exceeds the {num_tokens} tokens of the clip"
            )

    def group(
        self,
        features: Float[Array, "B *T N D"],
        tokens: Int[Array, "B *T N K"],
        rays: Float[Array, "B *T N 6"],
        visible: Bool[Array, "B *T N"],
    ) -> Group:
        """What is clustered of tokens: their features, normalised, and their mean rays."""
        x, ids, mask = self.blocks[0].norm1(features.astype(jnp.float32)), tokens, visible
        if self.blank_code is not None:
            mask = mask & jnp.any(tokens != self.blank_code, axis=-1)
        if self.place is not None:
            # Distances are divided by the root of the width: this makes the weight one beside it.
            weight = self.place * math.sqrt(x.shape[-1])
            x = jnp.concatenate([x, weight * rays.astype(jnp.float32)], axis=-1)
            number = jnp.arange(x.shape[-2], dtype=ids.dtype)[:, None]
            number = jnp.broadcast_to(number, (*ids.shape[:-1], 1))
            ids = jnp.concatenate([ids, number], axis=-1)
        return Group(x, ids, mask)

    def cluster(self, carry: Peaks, group: Group) -> tuple[Peaks, Clusters]:
        """`container_update` with this container's sizes."""
        sizes = dict(k=self.neighbors, num_clusters=self.num_slots, rounded=self.rounded)
        return container_update(carry, group, density=self.density, **sizes)

    def cluster_history(
        self, groups: Group, chosen: Callable[[Any], Any] = lambda y: y
    ) -> Clusters:
        """For the `chosen` timesteps t of `groups` [B, T, ...] the clusters of groups 1 to t-1.

        Axes are [B, G, ...]. Raises ValueError if the container has more slots than there are
        tokens.
        """
        batch, timesteps, size, width = groups.x.shape
        self.check(timesteps * size)
        if self.density == "group":
            sizes = dict(k=self.neighbors, num_clusters=self.num_slots, rounded=self.rounded)
            steps = chosen(jnp.broadcast_to(jnp.arange(timesteps), (batch, timesteps)))
            x = jax.lax.stop_gradient(groups.x).astype(jnp.float32)
            arrays = (x, groups.ids, groups.mask, steps)
            found = jax.vmap(functools.partial(dpc_knn.clusters_before, **sizes))(*arrays)
            none = _no_clusters(batch, self.num_slots, timesteps * size)
            begun = steps[..., None] > 0
            return jax.tree.map(lambda a, b: jnp.where(begun, a, b[:, None]), found, none)
        start = empty_container(batch, timesteps * size, width, groups.ids.shape[-1])
        none = _no_clusters(batch, self.num_slots, timesteps * size)
        past = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0)[:-1], groups)
        _, clusters = jax.lax.scan(self.cluster, start, past)
        clusters = jax.tree.map(
            lambda a, b: jnp.moveaxis(jnp.concatenate([a[None], b.astype(a.dtype)]), 0, 1),
            none,
            clusters,
        )
        return jax.tree.map(chosen, clusters)

    def refine(
        self,
        x: Float[Array, "B S D"],
        positions: Float[Array, "B S C"],
        scores: Float[Array, "B S"],
        keys_values: tuple[Float[Array, "B S H E"], Float[Array, "B S H E"]],
        clusters: Clusters,
    ) -> tuple[Float[Array, "B M D"], Float[Array, "B M C"]]:
        """Merges and refines the clusters of tokens; also the means of their positions.

        Of the keys those count up to the last that is in a cluster.
        """
        first, *others = self.blocks
        assignment, valid = clusters.assignment, clusters.valid
        both = jnp.concatenate([x.astype(jnp.float32), positions], axis=-1)
        both = merge(both, scores, assignment, self.num_slots)
        z, means = both[..., : x.shape[-1]], both[..., x.shape[-1] :]
        places = None if self.place is None else means[..., : self.dim]
        last = jnp.where(assignment >= 0, jnp.arange(1, x.shape[1] + 1), 1)
        z = first(z, keys_values, jnp.max(last, axis=1), places)
        for block in others:
            y = block.norm1(z.astype(jnp.float32))
            seen = y if places is None else y + places
            z = block(y, block.keys_values(seen, block.scores(y), valid), None, places)
        return z, means

    def attended(
        self, x: Float[Array, "B S D"], positions: Float[Array, "B S C"], seen: Bool[Array, "B S"]
    ) -> tuple:
        """Scores of tokens, and their keys and values, with the place where it is wanted."""
        scores = self.blocks[0].scores(x)
        placed = x if self.place is None else x + positions[..., : self.dim].astype(x.dtype)
        return scores, self.blocks[0].keys_values(placed, scores, seen)

    def states(
        self, x: Float[Array, "B S D"], positions: Float[Array, "B S C"], clusters: Clusters
    ) -> tuple[Float[Array, "B G M D"], Float[Array, "B G M C"]]:
        """Refined features of the clusters of each of G groups, and means of their positions.

        Axes of `clusters` are [B, G, ...]. A group's clusters hold, of the tokens up to its last
        one, all that are in any group's. So many groups run at a time, rematerialised, as
        `MOST_WEIGHTS` allows for their [S, M] memberships; one where devices share the batch, which
        would have to change its place.
        """
        seen = jnp.any(clusters.assignment >= 0, axis=1)
        scores, keys_values = self.attended(x, positions, seen)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(clusters: Clusters):
            return self.refine(x, positions, scores, keys_values, clusters)

        groups, weights = clusters.valid.shape[1], len(x) * self.num_slots * x.shape[1]
        most = 1 if sharding.parts("batch") > 1 else MOST_WEIGHTS // weights
        size = max(n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n <= most))
        clusters = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), clusters)
        z, means = jax.lax.map(one, clusters, batch_size=size)
        return jnp.moveaxis(z, 0, 1), jnp.moveaxis(means, 0, 1)

    def advance(self, carry: Merged, group: Group, positions: Float[Array, "B N C"]) -> Merged:
        """The recursive update: the state, with a group's tokens, becomes the next one."""
        z = self.blocks[0].norm1(carry.z.astype(jnp.float32))
        more = positions.shape[-1]  # behind these come the weighed rays
        number = -1 - jnp.arange(self.num_slots, dtype=group.ids.dtype)
        number = jnp.broadcast_to(number[:, None], (*z.shape[:2], group.ids.shape[-1]))
        before = Group(jnp.concatenate([z, carry.means[..., more:]], -1), number, carry.valid)
        size = self.num_slots + group.x.shape[1]
        peaks = empty_container(len(z), size, group.x.shape[-1], group.ids.shape[-1])
        peaks, _ = self.cluster(peaks, before)
        _, clusters = self.cluster(peaks, group)

        x = jnp.concatenate([z, group.x[..., : self.dim]], axis=1)
        positions = jnp.concatenate([positions, group.x[..., self.dim :]], axis=-1)
        positions = jnp.concatenate([carry.means, positions], axis=1)
        scores, keys_values = self.attended(x, positions, clusters.assignment >= 0)
        z, means = self.refine(x, positions, scores, keys_values, clusters)
        return Merged(z, means, clusters.valid, clusters.assignment[:, self.num_slots :])

    def start(self, batch: int, timesteps: int, size: int, num_codebooks: int) -> Carry:
        """What decoding carries before the first of `timesteps` groups of `size` tokens."""
        rays, number = (0, 0) if self.place is None else (6, 1)
        slots = self.num_slots
        if self.recursive:
            return Merged(
                z=jnp.zeros((batch, slots, self.dim), jnp.float32),
                means=jnp.zeros((batch, slots, self.dim + 4 + rays), jnp.float32),
                valid=jnp.zeros((batch, slots), bool),
                previous=jnp.full((batch, size), -1, jnp.int32),
            )
        peaks = empty_container(batch, timesteps * size, self.dim + rays, num_codebooks + number)
        return peaks, _no_clusters(batch, slots, timesteps * size)

    def update(self, carry: Carry, group: Group, positions: Float[Array, "B N C"]) -> Carry:
        """What decoding carries after a group, whose tokens are at `positions`."""
        if isinstance(carry, Merged):
            return self.advance(carry, group, positions)
        return self.cluster(carry[0], group)

    def read(self, carry: Carry, positions: Float[Array, "B T N C"], t: Int[Array, ""]) -> Merged:
        """The state for timestep t, as the only one of its groups, after those before it."""
        if isinstance(carry, Merged):
            return jax.tree.map(lambda y: y[:, None], carry)
        peaks, clusters = carry
        batch, _, size, width = positions.shape
        positions = positions.reshape(batch, -1, width)
        clusters = jax.tree.map(lambda y: y[:, None], clusters)
        steps = jnp.broadcast_to(t, (batch, 1))
        return self._merged(peaks.x, positions, clusters, steps, size)

    def over_time(
        self,
        groups: Group,
        positions: Float[Array, "B T N C"],
        chosen: Callable[[Any], Any] = lambda y: y,
    ) -> Merged:
        """The states for the `chosen` timesteps of a clip from the groups before each."""
        batch, timesteps, size, width = positions.shape
        if self.recursive:
            start = self.start(batch, timesteps, size, 0)
            advance = jax.checkpoint(self.advance)

            def one(carry, group_and_positions):
                return advance(carry, *group_and_positions), carry

            inputs = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), (groups, positions))
            _, merged = jax.lax.scan(one, start, inputs)
            return jax.tree.map(lambda y: chosen(jnp.moveaxis(y, 0, 1)), merged)
        steps = jnp.broadcast_to(jnp.arange(timesteps), (batch, timesteps))
        clusters = self.cluster_history(groups, chosen)
        x = groups.x.reshape(batch, -1, groups.x.shape[-1])
        positions = positions.reshape(batch, -1, width)
        return self._merged(x, positions, clusters, chosen(steps), size)

    def _merged(self, x, positions, clusters: Clusters, steps, size: int) -> Merged:
        z, means = self.states(x[..., : self.dim], positions, clusters)
        assignment = clusters.assignment.reshape(*steps.shape, -1, size)
        before = jnp.maximum(steps - 1, 0)[..., None, None]
        previous = jnp.take_along_axis(assignment, before, axis=2)[:, :, 0]
        return Merged(z, means, clusters.valid, previous)

    def tell(self, merged: Merged, begun: Bool[Array, "B G"], dtype: Any) -> State:
        """What the slots are told of a state; nothing where none has `begun`."""
        z, means, valid, previous = merged
        valid = valid & begun[..., None]
        coordinates = jnp.where(valid[..., None], means[..., self.dim : self.dim + 4], 0)
        if self.as_tokens:
            tokens = self.mlp(z) + means[..., : self.dim] + self.segment[...]
            tokens = jnp.where(valid[..., None], tokens, self.empty[...]).astype(dtype)
        else:
            tokens, coordinates = z[:, :, :0].astype(dtype), coordinates[:, :, :0]
        if not self.by_place:
            return State(tokens, coordinates, [])
        member = jax.nn.one_hot(previous, self.num_slots, dtype=dtype)  # [B, G, N, M]
        told = jnp.einsum("bgnm,bgmd->bgnd", member, z.astype(dtype))
        if self.absent is not None:
            told = jnp.where((previous < 0)[..., None], self.absent[...].astype(dtype), told)
        told = jnp.where(begun[..., None, None], told, 0)
        told = told if self.around is None else surroundings(told, self.around)
        return State(tokens, coordinates, [mlp(told) for mlp in self.aligned])


def _no_clusters(batch: int, num_slots: int, num_tokens: int) -> Clusters:
    """Those before the first group."""
    return Clusters(
        centers=jnp.zeros((batch, num_slots), jnp.int32),
        valid=jnp.zeros((batch, num_slots), bool),
        assignment=jnp.full((batch, num_tokens), -1, jnp.int32),
    )
