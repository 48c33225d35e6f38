"""The Spatial-Temporal Container: the state that groups 1 to t-1 leave for group t (paper 3.2.2).

For each timestep: cluster the token features of all past groups by density peaks, merge each
cluster with weights exp(score), refine the merged features by attention over the tokens. The steps
follow the similar-token merger of UMIFormer (github.com/GaryZhu1996/UMIFormer, the first author's
group), whose order of operations the paper's text matches; it normalises the features first, and
the merge, the keys and values and the residual all see the normalised ones.

Clustering has no gradient and is incremental: `container_update` is one function for training,
which scans it over the groups, and for decoding, which calls it as groups come. What follows
(`Container.states`) has a gradient, into the features and the scores.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.kernels import dpc_knn
from fourdstar_jax.kernels.dpc_knn import Clusters, Peaks
from fourdstar_jax.star.embed import vector


class Group(NamedTuple):
    """The tokens of one timestep."""

    x: Float[Array, "B N D"]  # normalised features
    tokens: Int[Array, "B N K"]
    mask: Bool[Array, "B N"]  # False: in no cluster, and nobody's neighbour


def empty_container(batch: int, num_slots: int, dim: int, num_codebooks: int) -> Peaks:
    """The carry before the first group, with room for `num_slots` tokens."""
    peaks = dpc_knn.empty_peaks(num_slots, dim, num_codebooks)
    many = jax.tree.map(lambda y: jnp.broadcast_to(y, (batch, *y.shape)), peaks)
    return many._replace(filled=peaks.filled)


# All samples of a batch have had the same number of groups.
_AXES: Any = Peaks(*[0] * (len(Peaks._fields) - 1), filled=None)  # pyright: ignore


@functools.partial(jax.jit, static_argnames=("k", "num_clusters"))
def container_update(
    carry: Peaks, group: Group, *, k: int, num_clusters: int
) -> tuple[Peaks, Clusters]:
    """Takes a group in and clusters all tokens so far. Carries no gradient."""
    x = jax.lax.stop_gradient(group.x).astype(jnp.float32)

    def one(peaks, x, tokens, mask):
        peaks = dpc_knn.add_group(peaks, x, tokens, mask, k=k)
        return peaks, dpc_knn.find_clusters(peaks, num_clusters=num_clusters)

    return jax.vmap(one, in_axes=(_AXES, 0, 0, 0), out_axes=(_AXES, 0))(
        carry, x, group.tokens, group.mask
    )


def merge(
    x: Float[Array, "B S C"], scores: Float[Array, "B S"], assignment: Int[Array, "B S"], size: int
) -> tuple[Float[Array, "B M C"], Float[Array, "B M S"]]:
    """Means over the clusters with weights exp(score), and the weights; 0 for an empty cluster."""
    member = assignment[:, None] == jnp.arange(size)[:, None]  # [B, M, S]
    scores = jnp.broadcast_to(scores[:, None], member.shape)
    largest = jnp.max(scores, axis=-1, where=member, initial=-jnp.inf, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    weights = jnp.exp(jnp.where(member, scores - largest, -jnp.inf))
    weights = weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), 1e-9)
    return jnp.einsum("bms,bsc->bmc", weights, x.astype(jnp.float32)), weights


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
        self, x: Float[Array, "B S D"], scores: Float[Array, "B S"]
    ) -> tuple[Float[Array, "B S H E"], Float[Array, "B S H E"]]:
        """Keys with the score as one more channel, so that any fused attention can be used.

        Both are padded to a multiple of 8 channels, which such attention asks for.
        """
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
        mask: Bool[Array, "B S"],
    ) -> Float[Array, "B M D"]:
        k, v = keys_values
        q = self.q(z).reshape(*z.shape[:2], self.num_heads, -1)
        head_dim = q.shape[-1]
        scale = head_dim**-0.5
        # The query's channel against the score: scale * (1 / scale) * score = score.
        q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, k.shape[-1] - head_dim)))
        q = q.at[..., head_dim].set(1 / scale)
        y = nn.attend(q, k, v, mask=mask[:, None, None], scale=scale)
        y = y[..., :head_dim].reshape(*z.shape)
        z = z + self.out(y)
        return z + self.mlp(self.norm2(z))


class Container(nnx.Module):
    """M condition tokens for each group from all groups before it.

    A slot's token is an MLP of the refined feature, plus the mean positional encoding of the
    cluster (merging lost where and when its tokens were), plus a segment vector. Slots without a
    cluster (before the first group, or when fewer tokens differ) hold one learned vector and stay
    visible, so that the attention mask is the same for every group. The first refinement block
    attends to the tokens, the next ones to the merged features themselves, which is what the public
    merger's second block amounts to when both have the same number of centres.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_slots: int,
        neighbors: int,
        refine_blocks: int,
        init,
        out_init=None,
        dtype,
        rngs: nnx.Rngs,
    ):
        if refine_blocks < 1:
            raise ValueError(f"{refine_blocks=} must be at least 1")
        kw = nn.CommonInit(init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List(
            [RefineBlock(dim, num_heads, out_init=out_init, **kw) for _ in range(refine_blocks)]
        )
        self.mlp = nn.Mlp(dim, dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.segment = vector(rngs.params(), dim)
        self.empty = vector(rngs.params(), dim)
        self.num_slots, self.neighbors = num_slots, neighbors

    def normalize(self, features: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """What the container clusters, merges and attends to."""
        return self.blocks[0].norm1(features.astype(jnp.float32))

    def update(self, carry: Peaks, group: Group) -> tuple[Peaks, Clusters]:
        """`container_update` with this container's sizes."""
        return container_update(carry, group, k=self.neighbors, num_clusters=self.num_slots)

    def cluster_history(
        self,
        x: Float[Array, "B T N D"],
        tokens: Int[Array, "B T N K"],
        mask: Bool[Array, "B T N"],
    ) -> Clusters:
        """For every timestep t the clusters of groups 1 to t-1, with axes [B, T, ...].

        Raises ValueError if the container has more slots than the clip has tokens.
        """
        batch, timesteps, size, dim = x.shape
        self.check(timesteps * size)
        start = empty_container(batch, timesteps * size, dim, tokens.shape[-1])
        none = Clusters(
            centers=jnp.zeros((1, batch, self.num_slots), jnp.int32),
            valid=jnp.zeros((1, batch, self.num_slots), bool),
            assignment=jnp.full((1, batch, timesteps * size), -1, jnp.int32),
        )
        groups = jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0)[:-1], Group(x, tokens, mask))
        _, clusters = jax.lax.scan(self.update, start, groups)
        return jax.tree.map(
            lambda a, b: jnp.moveaxis(jnp.concatenate([a, b.astype(a.dtype)]), 0, 1), none, clusters
        )

    def check(self, num_tokens: int):
        """Raises ValueError if the container has more slots than there are tokens to fill them."""
        if self.num_slots > num_tokens:
            raise ValueError(
                f"container_slots={self.num_slots} exceeds the {num_tokens} tokens of the clip"
            )

    def states(
        self,
        x: Float[Array, "B S D"],
        positions: Float[Array, "B S C"],
        clusters: Clusters,
    ) -> tuple[Float[Array, "B G M D"], Float[Array, "B G M C"]]:
        """Refined features of the clusters of each of G groups, and their mean positions.

        Axes of `clusters` are [B, G, ...]. The groups run one after the other, rematerialised, so
        that only one group's [M, S] weights exist at a time.
        """
        first = self.blocks[0]
        scores = first.scores(x)
        keys_values = first.keys_values(x, scores)

        @jax.checkpoint
        def one(clusters: Clusters):
            assignment, valid = clusters.assignment, clusters.valid
            z, weights = merge(x, scores, assignment, self.num_slots)
            z = first(z, keys_values, assignment >= 0)
            for block in list(self.blocks)[1:]:
                y = block.norm1(z.astype(jnp.float32))
                z = block(y, block.keys_values(y, block.scores(y)), valid)
            return z, jnp.einsum("bms,bsc->bmc", weights, positions.astype(jnp.float32))

        z, places = jax.lax.map(one, jax.tree.map(lambda y: jnp.moveaxis(y, 1, 0), clusters))
        return jnp.moveaxis(z, 0, 1), jnp.moveaxis(places, 0, 1)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        spe: Float[Array, "B S D"],
        coordinates: Float[Array, "B S C"],
        clusters: Clusters,
    ) -> tuple[Float[Array, "B G M D"], Float[Array, "B G M C"]]:
        """Condition tokens for G groups and their mean coordinates."""
        dim = spe.shape[-1]
        places = jnp.concatenate([spe.astype(jnp.float32), coordinates], axis=-1)
        z, places = self.states(x, places, clusters)
        tokens = self.mlp(z) + places[..., :dim] + self.segment[...]
        tokens = jnp.where(clusters.valid[..., None], tokens, self.empty[...])
        return tokens.astype(spe.dtype), places[..., dim:]
