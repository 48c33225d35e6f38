"""The definition of `add_layer_norm`, of any types: plain jnp."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


class Norm(NamedTuple):
    """A LayerNorm's parameters; `epsilon` is a number, not an array."""

    scale: Float[Array, " D"]
    bias: Float[Array, " D"]
    epsilon: float


def add_layer_norm(
    x: Float[Array, "*b D"],
    y: Float[Array, "*b D"] | None,
    norms: Sequence[Norm],
    bias: Float[Array, " D"] | None,
    dtype: Any,
) -> tuple[Float[Array, "*b D"], Float[Array, "*b D"]]:
    """`x + (y + bias)`, and its LayerNorms one after the other, of type `dtype`."""
    if y is not None:
        x = x + (y if bias is None else y + bias.astype(y.dtype))
    z = x.astype(dtype)
    for norm in norms:
        z = layer_norm(z, norm)
    return x, z


def layer_norm(x: Float[Array, "*b D"], norm: Norm) -> Float[Array, "*b D"]:
    """The LayerNorm of x as `nnx.LayerNorm` of x's type computes it."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    square = jnp.mean(wide * wide, axis=-1, keepdims=True)
    variance = jnp.maximum(0.0, square - mean * mean)
    factor = lax.rsqrt(variance + norm.epsilon) * norm.scale.astype(x.dtype)
    return ((x - mean) * factor + norm.bias.astype(x.dtype)).astype(x.dtype)
