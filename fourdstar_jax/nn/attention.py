"""Attention of given queries, keys and values, and the module that makes them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.nn import splash
from fourdstar_jax.nn.linear import linear

MOST_SCORES = 2**28  # of queries and keys at once, where they lie in memory: 1 GB as float32


def fits_cudnn(q: Float[Array, "*b H E"]) -> bool:
    """Whether cuDNN's attention takes such queries: on a GPU, in half precision, E of 8 to 128."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and jax.default_backend() == "gpu"


def attend(
    q: Float[Array, "b L H E"],
    k: Float[Array, "b S Hk E"],
    v: Float[Array, "b S Hk E"],
    *,
    mask: Bool[Array, "b2 H2 L2 S"] | None = None,
    lengths: Int[Array, " b"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b L H E"]:
    """Softmax attention; True in the mask is seen, and its axes may be 1.

    Of the keys the first `lengths` are seen, at least one. Without a mask, where cuDNN takes it
    (`fits_cudnn`; JAX trains by it with even L and S only), it is cuDNN's, and on a TPU, over all
    keys, `splash`'s; elsewhere queries come in parts where the scores of all would not fit
    (`MOST_SCORES`), if all see the same. `scale` of the scores is 1 / sqrt(E) unless given; several
    heads of queries may share those of keys (H a multiple of Hk).
    """
    even = q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    fused = mask is None and even and fits_cudnn(q)
    if mask is None and lengths is None and scale is None and splash.fits(q, k):
        if not causal or q.shape[1] == k.shape[1]:
            return splash.attend(q, k, v, causal)

    def call(q):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=mask,
            scale=scale,
            is_causal=causal,
            key_value_seq_lengths=lengths,
            implementation="cudnn" if fused else None,
        )

    least = math.ceil(math.prod(q.shape[:3]) * k.shape[1] / MOST_SCORES)
    if fused or mask is not None or causal or least <= 1:
        return call(q)
    length = q.shape[1]
    size = max(
        n for n in range(1, length + 1) if length % n == 0 and (n == 1 or n * least <= length)
    )
    parts = jnp.moveaxis(q.reshape(q.shape[0], -1, size, *q.shape[2:]), 1, 0)
    y = jax.lax.map(jax.checkpoint(call, prevent_cse=False), parts)  # scores are made again
    return jnp.moveaxis(y, 0, 1).reshape(q.shape)


def attend_short(
    q: Float[Array, "b L H E"], k: Float[Array, "b L Hk E"], v: Float[Array, "b L Hk E"]
) -> Float[Array, "b L H E"]:
    """Causal attention of many sequences of a few slots each.

    On a GPU by sums of products, which are fused: cuDNN works on tiles of 64 or 128 slots, and
    matrix products of eight by eight are slow there.
    """
    return by_sums(q, k, v) if fits_cudnn(q) else attend(q, k, v, causal=True)


def by_sums(
    q: Float[Array, "b L H E"], k: Float[Array, "b L Hk E"], v: Float[Array, "b L Hk E"]
) -> Float[Array, "b L H E"]:
    """Causal attention without matrix products, in float32."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2).astype(jnp.float32) for x in (k, v))
    scores = jnp.sum(q[:, :, None].astype(jnp.float32) * k[:, None], axis=-1) * q.shape[-1] ** -0.5
    seen = np.tri(q.shape[1], dtype=bool)[None, :, :, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=2)
    return jnp.sum(weights[..., None] * v[:, None], axis=2).astype(q.dtype)


class Attention(nnx.Module):
    """Multi-head attention of queries over a context (itself where none is given)."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        use_bias: bool = False,
        init=None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if dim % num_heads:
            raise ValueError(f"{dim=} must be a multiple of {num_heads=}")
        context_dim = dim if context_dim is None else context_dim
        make = functools.partial(linear, init=init, dtype=dtype, rngs=rngs)
        self.q = make(dim, dim, ("embed", "heads"), use_bias=use_bias)
        self.k = make(context_dim, dim, ("embed", "heads"), use_bias=use_bias)
        self.v = make(context_dim, dim, ("embed", "heads"), use_bias=use_bias)
        self.out = make(dim, dim, ("heads", "embed"), use_bias=True)
        self.num_heads = num_heads

    def __call__(
        self,
        x: Float[Array, "*b L D"],
        context: Float[Array, "*b S C"] | None = None,
        mask: Bool[Array, "... L S"] | None = None,
    ) -> Float[Array, "*b L D"]:
        context = x if context is None else context

        def heads(y):  # [B, L, H, Dh], all leading axes folded into B
            return y.reshape(-1, y.shape[-2], self.num_heads, y.shape[-1] // self.num_heads)

        q, k, v = heads(self.q(x)), heads(self.k(context)), heads(self.v(context))
        if mask is not None:
            mask = mask.reshape(-1, 1, *mask.shape[-2:])  # [B or 1, every head, L, S]
        y = attend(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))
