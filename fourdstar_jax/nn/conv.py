"""Convolutions and changes of a picture's size. Pictures are NHWC."""

import functools
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
    kind = nnx.Conv
    if stride == 1 and padding is None and (size == 1 or depthwise):
        kind = DepthwiseConv if depthwise else PointConv
    kernel_init = init if init is not None else nnx.initializers.lecun_normal()
    bias_init = nnx.initializers.zeros
    if bias is not None:

        def bias_init(key, shape, dtype, out_sharding=None):
            return jnp.asarray(bias, dtype)

    return kind(
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


class PointConv(nnx.Conv):
    """A 1x1 convolution, done as the matrix product that it is."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c2"]:
        dtype = inputs.dtype if self.dtype is None else self.dtype
        return inputs.astype(dtype) @ self.kernel[...][0, 0].astype(dtype) + _bias(self, dtype)


class DepthwiseConv(nnx.Conv):
    """A convolution of each channel alone, done as a sum of moved pictures.

    Elementwise work, which fuses; there is no choice among a library's algorithms to be made when
    the program compiles.
    """

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Float[Array, "b h w c"]
    ) -> Float[Array, "b h w c"]:
        dtype = inputs.dtype if self.dtype is None else self.dtype
        y = _moved_sum(inputs.astype(dtype), self.kernel[...].astype(dtype))
        return y + _bias(self, dtype)


@jax.custom_vjp
def _moved_sum(
    x: Float[Array, "b h w c"], kernel: Float[Array, "k k 1 c"]
) -> Float[Array, "b h w c"]:
    """The sum of x moved by each place of an odd kernel, times the kernel there; in float32.

    x is kept for the gradient, not a moved picture for each place; that of x is such a sum again,
    where autodiff's has a padded picture for each.
    """
    terms = [y * weight for y, weight in zip(_moved(x, len(kernel)), _weights(kernel), strict=True)]
    return functools.reduce(jnp.add, terms).astype(x.dtype)


def _weights(kernel: Float[Array, "k k 1 c"]) -> Float[Array, "k*k c"]:
    return kernel.reshape(-1, kernel.shape[-1]).astype(jnp.float32)


def _moved(x: Float[Array, "b h w c"], size: int) -> list[Float[Array, "b h w c"]]:
    """x as seen from each place of a kernel, row by row, float32.

    The padded picture is written once: a test of each pixel's place nine times over takes twice as
    long on a GPU.
    """
    h, w = x.shape[1:3]
    edge = (size // 2, size // 2)
    padded = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), edge, edge, (0, 0))))
    places = range(size)
    return [padded[:, i : i + h, j : j + w].astype(jnp.float32) for i in places for j in places]


def _kept(x, kernel):
    return _moved_sum(x, kernel), (x, kernel)


def _gradients(arrays, dy):
    x, kernel = arrays
    dx = _moved_sum(dy, kernel[::-1, ::-1])
    dy = dy.astype(jnp.float32)
    sums = jnp.stack([jnp.sum(y * dy, (0, 1, 2)) for y in _moved(x, len(kernel))])
    return dx, sums.reshape(kernel.shape).astype(kernel.dtype)


_moved_sum.defvjp(_kept, _gradients)


def _bias(layer: nnx.Conv, dtype: Any) -> Float[Array, " c"]:
    return layer.bias[...].astype(dtype)  # pyright: ignore[reportOptionalSubscript]


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
    kernel = kernel.reshape(-1, 4 * kernel.shape[-1]).astype(dtype)  # [2 2 c, 2 2 c2]
    b, h, w, _ = x.shape
    x = jnp.pad(x.astype(dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))
    # As a matrix product over the four pixels: it needs no choice among many algorithms.
    pixels = [x[:, i : i + h + 1, j : j + w + 1] for i in (0, 1) for j in (0, 1)]
    y = jnp.concatenate(pixels, axis=-1) @ kernel
    y = y.reshape(b, h + 1, w + 1, 2, 2, -1)
    rows = [jnp.stack([y[:, i : i + h, j : j + w, i, j] for j in (0, 1)], 3) for i in (0, 1)]
    y = jnp.stack(rows, 2).reshape(b, 2 * h, 2 * w, -1)
    return y + _bias(layer, dtype)


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
