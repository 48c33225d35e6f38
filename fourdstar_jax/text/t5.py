"""FLAN-T5's encoder (T5 v1.1; Raffel et al. 2020, arXiv:1910.10683), of any size.

A caption becomes the features [L, D] that STAR's text prefix takes with `text_encoder="t5"`: 120
tokens of FLAN-T5 XL in the paper, computed once and for all (see `data.features`).

What differs from other transformers: RMSNorm (no mean) before each sublayer, no biases, queries
that are not scaled (the initialisation has it), heads whose width is independent of the model's,
and a bias on the attention logits by bucketed distance that all layers share.

"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int32

from fourdstar_jax import nn
from fourdstar_jax.sharding import constrain


def relative_buckets(
    distances: Int[np.ndarray, "*b"], num_buckets: int = 32, max_distance: int = 128
) -> Int32[np.ndarray, "*b"]:
    """Buckets of distances (key's place minus query's): near ones alone, far ones by logarithm.

    Keys after the query have the second half of the buckets. From `max_distance` on all are one.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    # float32 in this order: where a bucket begins, rounding decides
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    far = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + far.astype(np.int32), half - 1)
    return (half * (distances > 0) + np.where(size < exact, size, far)).astype(np.int32)


class Layer(nnx.Module):
    """Self-attention and a gated-GELU feed-forward; the residual stream stays float32."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        *,
        dtype: nn.Dtype,
        rngs: nnx.Rngs,
    ):
        def linear(din, dout, axes, std):
            init = nnx.initializers.normal(std)
            return nn.linear(din, dout, axes, init=init, dtype=dtype, rngs=rngs)

        inner = num_heads * head_dim
        self.attention_norm = nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        # T5's own initialisation; the queries' keeps the logits O(1)
        self.q = linear(dim, inner, ("embed", "heads"), (dim * head_dim) ** -0.5)
        self.k = linear(dim, inner, ("embed", "heads"), dim**-0.5)
        self.v = linear(dim, inner, ("embed", "heads"), dim**-0.5)
        self.out = linear(inner, dim, ("heads", "embed"), inner**-0.5)
        self.ffn_norm = nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.gate = linear(dim, hidden_dim, ("embed", "mlp"), dim**-0.5)
        self.up = linear(dim, hidden_dim, ("embed", "mlp"), dim**-0.5)
        self.down = linear(hidden_dim, dim, ("mlp", "embed"), hidden_dim**-0.5)
        self.num_heads, self.head_dim, self.dtype = num_heads, head_dim, dtype

    def attend(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "H L L"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        """x after self-attention over the places that `mask` shows."""
        y = self.attention_norm(x)

        def heads(z):  # [B, L, H, Dh]
            z = z.reshape(*x.shape[:2], self.num_heads, self.head_dim)
            return constrain(z, "batch", None, "heads", None)

        q, k, v = heads(self.q(y)), heads(self.k(y)), heads(self.v(y))
        logits = jnp.einsum("bqhe,bkhe->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        logits = jnp.where(mask[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(self.dtype)
        y = jnp.einsum("bhqk,bkhe->bqhe", weights, v)
        return x + self.out(y.reshape(*x.shape[:2], -1)).astype(jnp.float32)

    def feed_forward(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """x after the feed-forward."""
        y = self.ffn_norm(x)
        y = nnx.gelu(self.gate(y), approximate=True) * self.up(y)
        return x + self.down(y).astype(jnp.float32)

    def __call__(
        self,
        x: Float[Array, "B L D"],
        bias: Float[Array, "H L L"],
        mask: Bool[Array, "B L"],
    ) -> Float[Array, "B L D"]:
        return constrain(self.feed_forward(self.attend(x, bias, mask)), "batch", None, None)


class T5Encoder(nnx.Module):
    """T5 v1.1's encoder. FLAN-T5 XL: dim 2048, 24 layers, 32 heads of 64, hidden 5120."""

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        hidden_dim: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        dtype: nn.Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """`dtype` is the matrix products'; norms, softmax and residual stream are float32.

        Raises ValueError for float16, in which T5's feed-forwards overflow.
        """
        dtype = jnp.dtype(dtype)
        if dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"T5 computes in float32 or bfloat16, not {dtype} (float16 overflows)")
        if num_buckets < 4 or num_buckets % 4 or max_distance <= num_buckets // 4:
            raise ValueError(
                f"{num_buckets=} must be a multiple of 4 and {max_distance=} above a quarter of it"
            )

        def table(shape, axes, std):
            init = nnx.with_partitioning(nnx.initializers.normal(std), axes)
            return nnx.Param(init(rngs.params(), shape, jnp.float32))

        self.table = table((vocab_size, dim), ("vocab", "embed"), 1.0)
        self.distance_bias = table((num_buckets, num_heads), (None, "heads"), dim**-0.5)
        self.layers = nn.stack_layers(
            lambda rngs: Layer(dim, num_heads, head_dim, hidden_dim, dtype=dtype, rngs=rngs),
            num_layers,
            rngs,
        )
        self.norm = nnx.RMSNorm(dim, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
        self.dim, self.num_layers, self.num_buckets = dim, num_layers, num_buckets
        self.max_distance = max_distance

    def bias(self, length: int) -> Float[Array, "H L L"]:
        """What all layers add to the logits of [query, key], by their distance."""
        place = np.arange(length)
        buckets = relative_buckets(place - place[:, None], self.num_buckets, self.max_distance)
        return jnp.moveaxis(self.distance_bias[...][buckets], -1, 0)

    def __call__(
        self, ids: Int[Array, "B L"], mask: Bool[Array, "B L"] | None = None
    ) -> Float[Array, "B L D"]:
        """Features (float32) of ids as `pieces.tokenize` gives them.

        Without a mask all places are seen. Features at places that it hides mean nothing.
        """
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        bias = self.bias(ids.shape[1])

        def one(x, layer):
            return layer(x, bias, mask), None

        x, _ = jax.lax.scan(one, self.table[...][ids], self.layers)
        return self.norm(x)
