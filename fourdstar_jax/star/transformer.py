"""STAR's transformer: Llama blocks over two streams, the shared prefix and the groups.

Group t sees {prefix, container t, its own past} and no other group, so groups are an axis of the
batch (`nn.attend_groups`). The prefix runs once; every layer hands its keys and values of the
prefix to all groups. Decoding runs the same layers with the prefix and the group cached.

For comparison a group may also see the token slots of a window of groups before it. That takes a
mask for each group and keys for each pair of groups: no more than the small sizes can bear.

Blocks are Llama's (RMSNorm, SwiGLU, no biases) as in LlamaGen.
"""

import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.sharding import constrain


class KV(NamedTuple):
    """Keys, rotated already, and values."""

    k: Float[Array, "B S H E"]
    v: Float[Array, "B S H E"]


def concatenate(*parts: KV) -> KV:
    """Keys and values one after the other, along the slots."""
    return jax.tree.map(lambda *y: jnp.concatenate(y, axis=-3), *parts)


class Rotary(NamedTuple):
    """Cosines and sines of rotary angles: those of queries and those of keys of the same slots."""

    q: Float[Array, "*b L 2 R"]
    k: Float[Array, "*b L 2 R"]


def round_up(x: float, multiple: int = 32) -> int:
    return int(-(-x // multiple) * multiple)


def group_mask(num_prefix: int, num_container: int, num_tokens: int) -> Bool[np.ndarray, "Q S"]:
    """Who sees whom, for any group: rows container and tokens, columns prefix, container, tokens.

    Container slots see the prefix and each other, token slots those and their own past.
    """
    mask = np.zeros((num_container + num_tokens, num_prefix + num_container + num_tokens), bool)
    mask[:, : num_prefix + num_container] = True
    mask[num_container:, num_prefix + num_container :] = np.tri(num_tokens, dtype=bool)
    return mask


def window_of(history: str) -> int:
    """How many groups before it a group sees the tokens of. Raises ValueError for other words."""
    if found := re.fullmatch(r"container|full|window:([1-9]\d{0,3})", history):
        return int(found[1]) if found[1] else (0 if history == "container" else 1 << 16)
    raise ValueError(f"{history=} must be 'container', 'full' or 'window:w' with a number w")


def earlier_mask(
    groups: int, window: int, num_container: int, num_tokens: int
) -> Bool[np.ndarray, "G Q S"]:
    """Which slots of the `window` groups before it, oldest first, a group's slots see: its tokens
    all that there are, its container none."""
    there = np.arange(groups)[:, None] >= np.arange(window, 0, -1)
    mask = np.repeat(there, num_tokens, axis=1)[:, None]
    mask = np.repeat(mask, num_container + num_tokens, axis=1)
    mask[:, :num_container] = False
    return mask


def axial_angles(
    coordinates: Float[Array, "*b L A"], head_dim: int, base: float = 100.0
) -> Float[Array, "*b L 2 R"]:
    """Cosines and sines for rotary embeddings over A coordinates, an equal share of pairs each.

    Coordinates stay below a few dozen, hence the base of 100 (Su et al. 2021 take 10,000 for long
    texts). Pairs that are left over do not turn.
    """
    axes = coordinates.shape[-1]
    pairs = head_dim // 2 // axes
    if pairs < 1:
        raise ValueError(
            f"rope='axial' needs heads of at least {2 * axes} channels, not {head_dim}"
        )
    frequencies = base ** (-np.arange(pairs, dtype=np.float32) / pairs)
    angles = coordinates[..., None] * frequencies  # [..., L, A, pairs]
    angles = angles.reshape(*coordinates.shape[:-1], axes * pairs)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-2)


def rotate(x: Float[Array, "B L H E"], angles: Float[Array, "B L 2 R"] | None):
    """Turns the first R channels against the R after them."""
    if angles is None:
        return x
    pairs = angles.shape[-1]
    cos, sin = angles[:, :, None, 0].astype(x.dtype), angles[:, :, None, 1].astype(x.dtype)
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)


def dropout(x: Float[Array, "*b D"], rate: float, key: jax.Array | None) -> Float[Array, "*b D"]:
    """Zeroes a share of the entries, in whole 256ths, and scales the others; nothing without a key.

    A random byte decides an entry: a quarter of the bits that `jax.random.bernoulli` takes.
    """
    keep = round(256 * (1 - rate))
    if key is None or keep == 256:
        return x
    width = x.shape[-1]
    words = jax.random.bits(key, (*x.shape[:-1], math.ceil(width / 4)), jnp.uint32)
    drawn = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(*x.shape[:-1], -1)
    return jnp.where(drawn[..., :width] < keep, x / (keep / 256), 0)


class Layer(nnx.Module):
    """One Llama block. Queries may share keys and values (`num_kv_heads` < `num_heads`).

    `qk_norm` normalises the queries and keys of every head (Henry et al. 2020, arXiv:2010.04245).
    The matrices that add to the stream start from `out_init`, the others from `init`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        dropout: float = 0.0,
        init,
        out_init=None,
        dtype,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if dim % num_heads or num_heads % num_kv_heads:
            raise ValueError(f"{dim=}, {num_heads=}, {num_kv_heads=} must divide one another")
        kw = nn.CommonInit(init=init, dtype=dtype, rngs=rngs)
        out_init = out_init or init
        head_dim = dim // num_heads
        self.attention_norm = nnx.RMSNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.q = nn.linear(dim, dim, ("embed", "heads"), **kw)
        self.k = nn.linear(dim, num_kv_heads * head_dim, ("embed", "heads"), **kw)
        self.v = nn.linear(dim, num_kv_heads * head_dim, ("embed", "heads"), **kw)
        self.out = nn.linear(dim, dim, ("heads", "embed"), init=out_init, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.RMSNorm, head_dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (norm(), norm()) if qk_norm else (None, None)
        self.ffn_norm = nnx.RMSNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.ffn = nn.SwiGLU(dim, hidden_dim, out_init=out_init, **kw)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.dropout = dropout

    def qkv(self, x, rotary: Rotary | None):
        x = self.attention_norm(x)

        def heads(y, number):
            return constrain(
                y.reshape(*x.shape[:2], number, self.head_dim), "batch", None, "heads", None
            )

        q, k, v = nn.joined(x, self.q, self.k, self.v)
        q, k, v = heads(q, self.num_heads), heads(k, self.num_kv_heads), heads(v, self.num_kv_heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, rotary.q), rotate(k, rotary.k)
        return q, KV(k, v)

    def finish(self, x, y, key: jax.Array | None):
        """The rest of the block after attention gave y."""
        keys = (None, None) if key is None else jax.random.split(key)
        x = x + dropout(self.out(y.reshape(x.shape)), self.dropout, keys[0])
        return x + dropout(self.ffn(self.ffn_norm(x)), self.dropout, keys[1])

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        before: KV | Callable[[KV], KV] | None = None,
        *,
        mask: Bool[np.ndarray | Array, "*R Q S"] | None = None,
        causal: bool = False,
        rotary: Rotary | None = None,
        key: jax.Array | None = None,
    ) -> tuple[Float[Array, "B Q D"], KV]:
        """x over {before, x}; also returns the keys and values of x, which `before` may depend on.

        A mask may have an axis of the batch; `causal` is for nothing before x.
        """
        q, own = self.qkv(x, rotary)
        before = before(own) if callable(before) else before
        kv = own if before is None else concatenate(before, own)
        if mask is not None:
            mask = jnp.asarray(mask)[..., None, :, :]  # of every head
            mask = mask[None] if mask.ndim == 3 else mask
        y = nn.attend(q, kv.k, kv.v, mask=mask, causal=causal)
        return self.finish(x, y, key), own

    def groups(
        self,
        x: Float[Array, "B G Q D"],
        shared: KV,
        num_open: int,
        rotary: Rotary | None,
        key: jax.Array | None,
    ) -> Float[Array, "B G Q D"]:
        """Groups over what they share and their own; see `nn.attend_groups`."""
        flat = x.reshape(-1, *x.shape[2:])
        q, own = jax.tree.map(
            lambda y: y.reshape(*x.shape[:2], *y.shape[1:]), self.qkv(flat, rotary)
        )
        y = nn.attend_groups(q, (shared.k, shared.v), (own.k, own.v), num_open)
        return self.finish(flat, y, key).reshape(x.shape)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        prefix: KV,
        cache: KV,
        index: Int[Array, ""],
        rotary: Rotary | None = None,
        seen: Bool[Array, " S"] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KV]:
        """One slot: writes its keys and values at `index` of the cache and attends up to there.

        `seen` says which slots of `prefix` there are; all by default.
        """
        q, own = self.qkv(x, rotary)
        cache = jax.tree.map(
            lambda c, y: jax.lax.dynamic_update_slice_in_dim(c, y.astype(c.dtype), index, axis=1),
            cache, own,
        )  # fmt: skip
        q = q.reshape(q.shape[0], self.num_kv_heads, -1, self.head_dim) * self.head_dim**-0.5

        def logits(k):
            return jnp.einsum("bhre,bshe->bhrs", q, k, preferred_element_type=jnp.float32)

        past = jnp.arange(cache.k.shape[1]) <= index
        split = prefix.k.shape[1]
        before = logits(prefix.k)
        if seen is not None:
            before = jnp.where(seen, before, -jnp.inf)
        weights = jnp.concatenate([before, jnp.where(past, logits(cache.k), -jnp.inf)], axis=-1)
        weights = jax.nn.softmax(weights, axis=-1).astype(q.dtype)
        y = jnp.einsum("bhrs,bshe->bhre", weights[..., :split], prefix.v)
        y += jnp.einsum("bhrs,bshe->bhre", weights[..., split:], cache.v)
        return self.finish(x, y, None), cache


class Transformer(nnx.Module):
    """The layers, stacked and scanned over (a program of one layer compiles), and the last norm.

    Without `scan_layers` a training step has a program of all layers: longer to compile, and faster
    by what a scan takes to put aside and fetch again between its turns.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        *,
        num_kv_heads: int | None,
        qk_norm: bool,
        causal_prefix: bool,
        dropout: float,
        remat: bool,
        remat_saves: nn.Saves,
        scan_layers: bool,
        init,
        out_init,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.layers = nn.stack_layers(
            lambda rngs: Layer(
                dim, num_heads, hidden_dim, num_kv_heads=num_kv_heads, qk_norm=qk_norm,
                dropout=dropout, init=init, out_init=out_init, dtype=dtype, rngs=rngs,
            ),
            num_layers,
            rngs,
        )  # fmt: skip
        self.norm = nnx.RMSNorm(dim, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.num_layers = num_layers
        self.causal_prefix = causal_prefix
        self.remat: bool = remat
        self.remat_saves: nn.Saves = remat_saves
        self.scan_layers: bool = scan_layers

    def __call__(
        self,
        prefix: Float[Array, "B P D"],
        groups: Float[Array, "B G Q D"],
        num_container: int,
        prefix_rotary: Rotary | None = None,
        rotary: Rotary | None = None,
        key: jax.Array | None = None,
        *,
        aligned: Sequence[Float[Array, "B G N D"]] = (),
        window: int = 0,
    ) -> Float[Array, "B G Q D"]:
        """All groups at once, each of `num_container` slots of the container and N of tokens.

        Rotary angles of the groups have axes [B, G, Q, ...]. `aligned` is added to the tokens'
        slots, each of its entries before a part of the layers as long as the others. With `window`
        the groups, which are all of a clip, see the tokens' slots of so many before them.
        """
        batch, size, slots = groups.shape[:3]
        if rotary is not None:
            rotary = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), rotary)
        length = prefix.shape[1]
        tokens, mask = slots - num_container, None
        if window:
            mask = group_mask(length, num_container, tokens)
            earlier = earlier_mask(size, window, slots - tokens, tokens)
            rows = np.broadcast_to(mask, (size, *mask.shape))
            parts = [rows[..., :length], earlier, rows[..., length:]]
            mask = jnp.tile(np.concatenate(parts, axis=-1), (batch, 1, 1))

        def one(carry, layer_and_key):
            prefix, groups = carry
            layer, key = layer_and_key
            keys = (None, None) if key is None else jax.random.split(key)
            causal = self.causal_prefix
            prefix, kv = layer(prefix, causal=causal, rotary=prefix_rotary, key=keys[0])
            prefix = constrain(prefix, "batch", None, None)

            def before(own: KV) -> KV:
                shared = jax.tree.map(lambda y: jnp.repeat(y, size, axis=0), kv)

                def of_group_before(y, w):
                    late = y[:, num_container:].reshape(batch, size, tokens, *y.shape[2:])
                    return jnp.roll(late, w, axis=1).reshape(-1, *late.shape[2:])

                earlier = [KV(*(of_group_before(y, w) for y in own)) for w in range(window, 0, -1)]
                return concatenate(shared, *earlier)

            if window:
                flat = groups.reshape(-1, *groups.shape[2:])
                flat, _ = layer(flat, before, mask=mask, rotary=rotary, key=keys[1])
                groups = flat.reshape(groups.shape)
            else:
                groups = layer.groups(groups, kv, num_container, rotary, keys[1])
            groups = constrain(groups, "batch", None, None, None)
            return (prefix, groups), None

        keys = None if key is None else jax.random.split(key, self.num_layers)
        # Products saved, the compiler may keep what else it sees twice: faster, and a fifth more.
        in_scan = self.scan_layers or self.remat_saves == "products"
        body = nn.recomputed(one, self.remat, in_scan=in_scan, saves=self.remat_saves)
        unroll = 1 if self.scan_layers else True
        for part, more in zip(self.parts(len(aligned)), aligned or [None], strict=True):
            if more is not None:
                groups = groups.at[:, :, num_container:].add(more)
            layers = jax.tree.map(operator.itemgetter(part), (self.layers, keys))
            (prefix, groups), _ = jax.lax.scan(body, (prefix, groups), layers, unroll=unroll)
        return self.norm(groups)

    def parts(self, number: int) -> list[slice]:
        """The layers cut into as many parts (one if 0) as long as one another, or nearly."""
        number = max(number, 1)
        ends = [self.num_layers * i // number for i in range(number + 1)]
        return [slice(*x) for x in zip(ends[:-1], ends[1:], strict=True)]

    def by_layer(self, aligned: Sequence[Float[Array, "*b D"]]) -> Float[Array, "L *b D"] | None:
        """What is added before each layer, zeros for most."""
        if not aligned:
            return None
        added = jnp.zeros((self.num_layers, *aligned[0].shape), aligned[0].dtype)
        for part, more in zip(self.parts(len(aligned)), aligned, strict=True):
            added = added.at[part.start].add(more)
        return added

    def prefill(self, prefix: Float[Array, "B P D"], rotary: Rotary | None) -> KV:
        """Keys and values of the prefix; the layers are the first axis."""
        causal = self.causal_prefix
        return jax.lax.scan(
            lambda x, layer: layer(x, causal=causal, rotary=rotary), prefix, self.layers
        )[1]

    def block(
        self,
        x: Float[Array, "B Q D"],
        prefix: KV,
        mask: Bool[np.ndarray | Array, "Q S"],
        rotary: Rotary | None,
        size: int,
        aligned: Sequence[Float[Array, "B N D"]] = (),
    ) -> KV:
        """A cache with room for a group's `size` slots, filled with the first Q.

        `aligned` is added to the last N of these as in `__call__`.
        """

        def one(x, y):
            layer, before, added = y
            if added is not None:
                x = x.at[:, x.shape[1] - added.shape[1] :].add(added)
            return layer(x, before, mask=mask, rotary=rotary)

        _, own = jax.lax.scan(one, x, (self.layers, prefix, self.by_layer(aligned)))
        room = ((0, 0), (0, 0), (0, size - x.shape[1]), (0, 0), (0, 0))
        return jax.tree.map(lambda y: jnp.pad(y, room), own)

    def step(
        self,
        x: Float[Array, "B 1 D"],
        prefix: KV,
        cache: KV,
        index: Int[Array, ""],
        rotary: Rotary | None,
        aligned: Sequence[Float[Array, "B 1 D"]] = (),
        seen: Bool[Array, " S"] | None = None,
    ) -> tuple[Float[Array, "B 1 D"], KV]:
        """The hidden state of slot `index`, and the cache with it; `seen` as in `Layer.step`."""

        def one(x, y):
            layer, before, cache, added = y
            x = x if added is None else x + added
            return layer.step(x, before, cache, index, rotary, seen)

        x, cache = jax.lax.scan(one, x, (self.layers, prefix, cache, self.by_layer(aligned)))
        return self.norm(x), cache
