"""Layers that two models or more use: linear maps with named axes, attention, feed-forwards."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Bool, Float

Dtype = jnp.dtype | type


def linear(
    din: int,
    dout: int,
    axes: tuple[str | None, str | None],
    *,
    use_bias: bool = False,
    init: Initializer | None = None,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """`nnx.Linear` with logical sharding axes (input, output) on its kernel and bias."""
    kernel_init = init if init is not None else nnx.initializers.lecun_normal()
    return nnx.Linear(
        din,
        dout,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nnx.with_partitioning(kernel_init, axes),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros, axes[1:]),
        rngs=rngs,
    )


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], number: int, rngs: nnx.Rngs) -> Any:
    """One module whose parameters have a leading axis of `number` layers, for `lax.scan`."""
    layers = jax.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), number))

    def annotate(x):
        if isinstance(x, nnx.Variable) and (axes := x.get_metadata().get("out_sharding")):
            return x.copy(out_sharding=("layers", *axes))
        return x

    return jax.tree.map(annotate, layers, is_leaf=lambda x: isinstance(x, nnx.Variable))


def cast_weights(model: Any) -> Any:
    """The copy of a model whose bfloat16 layers hold bfloat16 weights, for inference.

    Half the memory and no conversion at each call, with the same numbers: `nnx.Linear` and
    `nnx.Conv` of `dtype` bfloat16 round their kernels and biases at every use anyway. (A layer that
    first sums its float32 weights, as `unitok.upsampled_conv`, then sums rounded ones.) Float32
    layers, norms and all else stay as they are.
    """

    def is_layer(x):
        return isinstance(x, nnx.Linear | nnx.Conv)

    def cast(x):
        if is_layer(x) and x.dtype == jnp.bfloat16:
            return jax.tree.map(lambda w: w.astype(jnp.bfloat16), x)
        return x

    return jax.tree.map(cast, model, is_leaf=is_layer)


class SwiGLU(nnx.Module):
    """SwiGLU feed-forward block (Shazeer 2020, arXiv:2002.05202), as in Llama."""

    def __init__(self, dim: int, hidden_dim: int, *, init=None, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(init=init, dtype=dtype, rngs=rngs)
        self.gate = linear(dim, hidden_dim, ("embed", "mlp"), **kw)
        self.up = linear(dim, hidden_dim, ("embed", "mlp"), **kw)
        self.down = linear(hidden_dim, dim, ("mlp", "embed"), **kw)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Mlp(nnx.Module):
    """Linear, GELU, Linear. `approximate=True` is the tanh form."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        out_dim: int,
        *,
        use_bias: bool = True,
        approximate: bool = True,
        init=None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(use_bias=use_bias, init=init, dtype=dtype, rngs=rngs)
        self.up = linear(dim, hidden_dim, ("embed", "mlp"), **kw)
        self.down = linear(hidden_dim, out_dim, ("mlp", "embed"), **kw)
        self.approximate = approximate

    def __call__(self, x: Float[Array, "*b Din"]) -> Float[Array, "*b Dout"]:
        return self.down(nnx.gelu(self.up(x), approximate=self.approximate))


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
        kw: dict[str, Any] = dict(init=init, dtype=dtype, rngs=rngs)
        self.q = linear(dim, dim, ("embed", "heads"), use_bias=use_bias, **kw)
        self.k = linear(context_dim, dim, ("embed", "heads"), use_bias=use_bias, **kw)
        self.v = linear(context_dim, dim, ("embed", "heads"), use_bias=use_bias, **kw)
        self.out = linear(dim, dim, ("heads", "embed"), use_bias=True, **kw)
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
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out(y.reshape(x.shape))
