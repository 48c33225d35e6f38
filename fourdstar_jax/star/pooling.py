"""Plainer states than the container's, to compare with it (paper Table 4): one vector a place.

    mean      the features of each place averaged over the timesteps before (the paper's B)
    learned   weighed by an MLP's scores, then through an MLP (C)
    last      those of the timestep before alone: its tokens as the condition (A, without L4GM)

They reach a group as the container's state does, as tokens to attend to and by place, so that the
way of merging is all that differs; there are as many tokens as places, four times the container's.
"""

import typing
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.star.container import Inject, State, aligned_mlps, surroundings
from fourdstar_jax.star.embed import vector

Pool = Literal["mean", "learned", "last"]


class Past(NamedTuple):
    """What decoding carries: the features so far, zero where there are none yet."""

    x: Float[Array, "B T N D"]
    filled: Int[Array, ""]  # timesteps


class Pooled(NamedTuple):
    """The state for each of G groups."""

    z: Float[Array, "B G N D"]
    means: Float[Array, "B G N C"]  # of positional encodings and coordinates


class Pooling(nnx.Module):
    """The state of all groups before a group, merged over time at each place.

    Called as `Container` is: training calls `over_time`; decoding `start`, then `update` and `read`
    for each group; both end in `tell`.
    """

    def __init__(
        self,
        dim: int,
        *,
        pool: Pool,
        inject: Inject = "both",
        around: int | None = None,
        dtype: nn.Dtype,
        rngs: nnx.Rngs,
    ):
        if pool not in typing.get_args(Pool):
            raise ValueError(f"{pool=} must be one of {typing.get_args(Pool)}")
        kw = nn.Common(dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        learned = pool == "learned"
        self.score = nn.Mlp(dim, max(dim // 4, 1), 1, use_bias=False, **kw) if learned else None
        self.merge = nn.Mlp(dim, 4 * dim, dim, use_bias=False, **kw) if learned else None
        self.as_tokens, self.by_place = inject in ("tokens", "both"), inject in ("aligned", "both")
        if self.as_tokens:
            self.mlp = nn.Mlp(dim, dim, dim, use_bias=False, **kw)
            self.segment = vector(rngs.params(), dim)
            self.empty = vector(rngs.params(), dim)
        if self.by_place:
            self.aligned = aligned_mlps(dim, around, **kw)
        self.dim, self.pool, self.around = dim, pool, around

    def check(self, num_tokens: int):
        """Any number of tokens does."""

    def group(
        self,
        features: Float[Array, "B *T N D"],
        tokens: Int[Array, "B *T N K"],
        rays: Float[Array, "B *T N 6"],
        visible: Bool[Array, "B *T N"],
    ) -> Float[Array, "B *T N D"]:
        """What is merged of tokens: their features, normalised."""
        del tokens, rays, visible  # hidden ones have the features of a hidden one
        return self.norm(features.astype(jnp.float32))

    def pooled(
        self,
        x: Float[Array, "B T N D"],
        positions: Float[Array, "B T N C"],
        steps: Int[Array, "B G"],
    ) -> Pooled:
        """The state for these timesteps, from those before each; zero before the first."""
        past = jnp.arange(x.shape[1])
        scores = jnp.zeros(x.shape[:3]) if self.score is None else self.score(x)[..., 0]
        seen = past < steps[..., None]  # [B, G, T]
        if self.pool == "last":
            seen = past == steps[..., None] - 1
        weights = jnp.where(seen[..., None], scores[:, None].astype(jnp.float32), -1e9)
        weights = jax.nn.softmax(weights, axis=2) * seen[..., None]  # [B, G, T, N]; 0 at first
        z = jnp.einsum("bgtn,btnd->bgnd", weights, x)
        if self.merge is not None:
            z = z + self.merge(z)
        return Pooled(z, jnp.einsum("bgtn,btnc->bgnc", weights, positions))

    def over_time(
        self,
        groups: Float[Array, "B T N D"],
        positions: Float[Array, "B T N C"],
        chosen: Callable[[Any], Any] = lambda y: y,
    ) -> Pooled:
        """The states for the `chosen` timesteps of a clip from the groups before each."""
        steps = jnp.broadcast_to(jnp.arange(groups.shape[1]), groups.shape[:2])
        return self.pooled(groups, positions, chosen(steps))

    def start(self, batch: int, timesteps: int, size: int, num_codebooks: int) -> Past:
        """What decoding carries before the first of `timesteps` groups of `size` tokens."""
        del num_codebooks
        x = jnp.zeros((batch, timesteps, size, self.dim), jnp.float32)
        return Past(x, jnp.zeros((), jnp.int32))

    def update(
        self, carry: Past, group: Float[Array, "B N D"], positions: Float[Array, "B N C"]
    ) -> Past:
        """What decoding carries after a group."""
        del positions
        x = jax.lax.dynamic_update_index_in_dim(carry.x, group, carry.filled, axis=1)
        return Past(x, carry.filled + 1)

    def read(self, carry: Past, positions: Float[Array, "B T N C"], t: Int[Array, ""]) -> Pooled:
        """The state for timestep t, as the only one of its groups, after those before it."""
        return self.pooled(carry.x, positions, jnp.broadcast_to(t, (len(carry.x), 1)))

    def tell(self, merged: Pooled, begun: Bool[Array, "B G"], dtype: Any) -> State:
        """What the slots are told of a state; nothing where none has `begun`."""
        z, means = merged
        valid = begun[..., None, None]
        coordinates = jnp.where(valid, means[..., self.dim : self.dim + 4], 0)
        if self.as_tokens:
            tokens = self.mlp(z) + means[..., : self.dim] + self.segment[...]
            tokens = jnp.where(valid, tokens, self.empty[...]).astype(dtype)
        else:
            tokens, coordinates = z[:, :, :0].astype(dtype), coordinates[:, :, :0]
        if not self.by_place:
            return State(tokens, coordinates, [])
        told = jnp.where(valid, z, 0).astype(dtype)
        told = told if self.around is None else surroundings(told, self.around)
        return State(tokens, coordinates, [mlp(told) for mlp in self.aligned])
