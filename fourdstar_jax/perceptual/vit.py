"""What the vision transformers that measure pictures share (Dosovitskiy et al. 2020)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from fourdstar_jax.nn.attention import attend
from fourdstar_jax.types import Array

HEAD = 64  # channels of an attention head


def patches(
    images: Float[Array, "b h w 3"], kernel: Float[Array, "d 3 p p"]
) -> Float[Array, "b n d"]:
    """The convolution that makes a token of each patch, row by row."""
    b, h, w, _ = images.shape
    patch = kernel.shape[-1]
    x = images.reshape(b, h // patch, patch, w // patch, patch, 3)
    return jnp.einsum("byixjc,dcij->byxd", x, kernel).reshape(b, -1, len(kernel))


def blocks(
    x: Float[Array, "b n d"], layers: dict[str, Any], *, eps: float, quick_gelu: bool
) -> Float[Array, "b n d"]:
    """Blocks with the norm before each half; `layers` are stacked: matrices `[layers, out, in]`.

    Their names: norm1, qkv, out, norm2, up, down, and each one's `_bias`. `quick_gelu` is CLIP's
    x sigmoid(1.702 x) in place of the exact GELU.
    """

    def block(x, layer):
        b, n, width = x.shape
        y = norm(x, layer["norm1"], layer["norm1_bias"], eps)
        y = y @ layer["qkv"].T + layer["qkv_bias"]
        q, k, v = (a.reshape(b, n, -1, HEAD) for a in jnp.split(y, 3, axis=-1))
        x = x + attend(q, k, v).reshape(b, n, width) @ layer["out"].T + layer["out_bias"]
        y = norm(x, layer["norm2"], layer["norm2_bias"], eps)
        y = y @ layer["up"].T + layer["up_bias"]
        y = y * nnx.sigmoid(1.702 * y) if quick_gelu else nnx.gelu(y, approximate=False)
        return x + y @ layer["down"].T + layer["down_bias"], None

    return jax.lax.scan(block, x, layers)[0]


def norm(x: Array, scale: Array, bias: Array, eps: float) -> Array:
    """LayerNorm over the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale + bias
