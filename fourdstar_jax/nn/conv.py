"""Convolutions and changes of a picture's size. Pictures are NHWC."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float

from fourdstar_jax.nn.linear import Dtype


def conv(
    din: int,
    dout: int,
    size: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    depthwise: bool = False,
    axis: str | None = "mlp",
    init: Initializer | None = None,
    bias: Sequence[float] | None = None,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Square convolution with torch's symmetric padding; `axis` is the output channels' name.

    Flax's "SAME" pads even sizes by (0, 1) at stride 2: another network than the released UniTok,
    but the one of VQ-16, which asks for it by `padding`, pixels (before, after) both ways.
    """
    kernel_init = init if init is not None else nnx.initializers.lecun_normal()
    bias_init = nnx.initializers.zeros
    if bias is not None:

        def bias_init(key, shape, dtype, out_sharding=None):
            return jnp.asarray(bias, dtype)

    return nnx.Conv(
        din,
        dout,
        (size, size),
        strides=stride,
        padding=[padding or (size // 2, size // 2)] * 2,
        feature_group_count=din if depthwise else 1,
        dtype=dtype,
        kernel_init=nnx.with_partitioning(kernel_init, (None, None, None, axis)),
        bias_init=nnx.with_partitioning(bias_init, (axis,)),
        rngs=rngs,
    )


def upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Twice the size, nearest neighbour."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


# Rows of a 3x3 kernel that meet one row of the small picture, for both rows of the large one:
# [tap, row of the large picture, row of the kernel].
_FOLD = np.array([[[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]], np.float32)


def upsampled_conv(layer: nnx.Conv, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c2"]:
    """`layer(upsample(x))` of a 3x3 convolution, with 4/9 of its multiplications.

    Of the nine pixels under the kernel only four are different ones. So four 2x2 kernels, sums of
    the 3x3 one, run over the small picture and give the four phases of the large one.
    """
    dtype = x.dtype if layer.dtype is None else layer.dtype
    kernel = layer.kernel[...].astype(jnp.float32)
    kernel = jnp.einsum("tar,ubs,rsio->tuiabo", _FOLD, _FOLD, kernel, precision="highest")
    kernel = kernel.reshape(*kernel.shape[:3], -1).astype(dtype)  # [2, 2, c, 4 c2]
    b, h, w, _ = x.shape
    y = jax.lax.conv_general_dilated(
        x.astype(dtype),
        kernel,
        (1, 1),
        [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    y = y.reshape(b, h + 1, w + 1, 2, 2, -1)
    rows = [jnp.stack([y[:, i : i + h, j : j + w, i, j] for j in (0, 1)], 3) for i in (0, 1)]
    y = jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1)
    return y + layer.bias[...].astype(dtype)  # pyright: ignore[reportOptionalSubscript]


def average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3 average at stride 2 that does not count the padding."""
    padding: Any = ((1, 1), (1, 1))
    return nnx.avg_pool(x, (3, 3), strides=(2, 2), padding=padding, count_include_pad=False)


def blur_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Half the size, each pixel a weighted mean of four by four: [1, 3, 3, 1] along both sides.

    Zhang 2019 (arXiv:1904.11486), with StyleGAN2's filter: little aliasing, so that a picture moved
    by one pixel looks alike after it. Zeros lie beyond the borders.

    Raises ValueError for odd sizes.
    """
    h, w = x.shape[1:3]
    if h % 2 or w % 2:
        raise ValueError(f"pictures of {w}x{h} pixels; both must be even")
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [x[:, i : i + h - 1 : 2] for i in range(4)]
    x = 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])
    taps = [x[:, :, i : i + w - 1 : 2] for i in range(4)]
    return 0.125 * (taps[0] + taps[3]) + 0.375 * (taps[1] + taps[2])


def depth_to_space(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Four channels to 2x2 pixels (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158)."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
