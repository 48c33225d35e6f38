"""UniTok: image tokenizer with a hybrid encoder and a multi-codebook quantiser (arXiv:2502.20321).

One family at every size. `stem="hybrid"`, `tail="hybrid"` are the layers of the released ViTamin-L
tokenizer (FoundationVision/UniTok; timm's ViTamin); The others are one plain strided or
upsampling convolution a level, for models that train on a CPU. Names follow the released state dict
(`encoder.blocks.0.attn.qkv`, `quant_proj.mlp.w0`, ...). Pictures are NHWC, tokens row-major.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.nn.initializers import Initializer
from jaxtyping import Array, Float, Int

from fourdstar_jax import sharding
from fourdstar_jax.kernels.layer_norm import Norm, add_layer_norm
from fourdstar_jax.nn import Dtype, linear
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.base import TokenizerSpec, weights_sha256

BLOCK_EPS = 1e-6  # LayerNorms of blocks, stems and GeGLU
PROJECTION_EPS = 1e-5  # LayerNorms of AttnProjection: torch's default


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


# erf(z) / z for |z| <= 3 as a polynomial in z^2, fitted for the smallest error of erf: 2.6e-5.
ERF_EDGE = 3.0
ERF = (
    1.1282684,
    -0.37531474,
    0.11107912,
    -0.025102708,
    0.0042353693,
    -0.00051102439,
    4.1059003e-05,
    -1.9447246e-06,
    4.0739502e-08,
)


def gelu(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Exact GELU. In bfloat16 the error function is a polynomial, off by 6e-5 at most.

    That is a hundredth of bfloat16's own rounding, and on a GPU it halves the time of what is
    otherwise a tenth of the decoder.
    """
    if x.dtype != jnp.bfloat16:
        return nnx.gelu(x, approximate=False)
    x = x.astype(jnp.float32)
    z = jnp.clip(x * math.sqrt(0.5), -ERF_EDGE, ERF_EDGE)
    erf = jnp.clip(z * jnp.polyval(jnp.asarray(ERF[::-1], jnp.float32), z * z), -1, 1)
    return (0.5 * x * (1 + erf)).astype(jnp.bfloat16)


class GeGluMlp(nnx.Module):
    """GELU-gated feed-forward with a LayerNorm of its own (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, din: int, hidden_dim: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(use_bias=True, dtype=dtype, rngs=rngs)
        self.norm = nnx.LayerNorm(din, epsilon=BLOCK_EPS, dtype=dtype, rngs=rngs)
        self.w0 = linear(din, hidden_dim, ("embed", "mlp"), **kw)
        self.w1 = linear(din, hidden_dim, ("embed", "mlp"), **kw)
        self.w2 = linear(hidden_dim, dout, ("mlp", "embed"), **kw)

    def __call__(self, x: Float[Array, "*b n din"]) -> Float[Array, "*b n dout"]:
        return apart_sum(self.normalized(self.norm(x)))

    def normalized(self, x: Float[Array, "*b n din"]) -> "Apart":
        """The output for an input that has been through `norm`."""
        x = nnx.gelu(self.w0(x), approximate=True) * self.w1(x)
        return Apart(x @ self.w2.kernel[...].astype(x.dtype), bias_of(self.w2))


class Apart(NamedTuple):
    """A layer's output that has not had its bias yet: whoever adds more adds both in one pass."""

    product: Float[Array, "*b n D"]
    bias: Float[Array, " D"]


def apart_sum(x: Apart) -> Float[Array, "*b n D"]:
    return x.product + x.bias.astype(x.product.dtype)


def bias_of(layer: nnx.Linear) -> Float[Array, " D"]:
    return layer.bias[...]  # pyright: ignore[reportOptionalSubscript]


def add_norms(
    x: Float[Array, "b n D"], y: Apart | None, *layers: nnx.LayerNorm
) -> tuple[Float[Array, "b n D"], Float[Array, "b n D"]]:
    """`x + y`, and what the LayerNorms one after the other make of it."""
    norms = [Norm(n.scale[...], n.bias[...], n.epsilon) for n in layers]  # pyright: ignore
    product, bias = (None, None) if y is None else y
    return add_layer_norm(x, product, norms, bias=bias, dtype=layers[0].dtype)


def self_attention(
    x: Float[Array, "b n D"],
    kernel: Float[Array, "D D3"],
    biases: Sequence[Float[Array, " D2"] | None],
    num_heads: int,
    dtype: Dtype,
) -> Float[Array, "b n {num_heads} Dh"]:
    """Full attention of a fused projection laid out (q|k|v, head, channel).

    The three products are taken one by one: cutting their joint result up again would copy it. In
    half precision on a GPU the attention is cuDNN's. `biases` are of q, k and v.
    """

    def project(w, b):
        y = x.astype(dtype) @ w
        y = y if b is None else y + b.astype(dtype)
        return y.reshape(*x.shape[:2], num_heads, -1)

    kernels = jnp.split(kernel.astype(dtype), 3, 1)
    q, k, v = (project(w, b) for w, b in zip(kernels, biases, strict=True))
    fused = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn" if fused else None)


class SelfAttention(nnx.Module):
    def __init__(self, dim: int, num_heads: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        if dim % num_heads:
            raise ValueError(f"{dim=} must be a multiple of {num_heads=}")
        kw: dict[str, Any] = dict(use_bias=True, dtype=dtype, rngs=rngs)
        self.qkv = linear(dim, 3 * dim, ("embed", "heads"), **kw)
        self.proj = linear(dim, dim, ("heads", "embed"), **kw)
        self.num_heads, self.dtype = num_heads, dtype

    def __call__(self, x: Float[Array, "b n D"]) -> Float[Array, "b n D"]:
        return apart_sum(self.apart(x))

    def apart(self, x: Float[Array, "b n D"]) -> Apart:
        """The output, its bias not yet added.

        In bfloat16 two passes over memory are saved: the keys' bias adds a constant to all scores
        of a query, which changes no softmax, and the values' bias goes through the attention as it
        is, for weights sum to one, so the projection adds it up with its own.
        """
        kernel, biases = self.qkv.kernel[...], jnp.split(bias_of(self.qkv), 3)
        proj, bias = self.proj.kernel[...], bias_of(self.proj)
        if self.dtype == jnp.bfloat16:
            # Of rounded weights, as the products are: then `nn.cast_weights` changes nothing.
            wide, value, bias = (
                jax.lax.reduce_precision(w.astype(jnp.float32), 8, 7)
                for w in (proj, biases[2], bias)
            )
            bias = bias + jnp.sum(value[:, None] * wide, 0)
            biases = (biases[0], None, None)
        y = self_attention(x, kernel, biases, self.num_heads, self.dtype)
        return Apart(y.reshape(x.shape) @ proj.astype(y.dtype), bias)


class Block(nnx.Module):
    """Pre-norm transformer block of the encoder and of the decoders."""

    def __init__(
        self, dim: int, num_heads: int, hidden_dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)
        self.attn = SelfAttention(dim, num_heads, **kw)
        self.norm2 = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)
        self.mlp = GeGluMlp(dim, hidden_dim, dim, **kw)

    def __call__(self, x: Float[Array, "b n D"]) -> Float[Array, "b n D"]:
        x, y = self.apart(x, None)
        return x + apart_sum(y)

    def apart(
        self, x: Float[Array, "b n D"], y: Apart | None
    ) -> tuple[Float[Array, "b n D"], Apart]:
        """The block of `x + y`, as such a sum, too: the next block's first norm adds it up."""
        x, z = add_norms(x, y, self.norm1)
        x, z = add_norms(x, self.attn.apart(z), self.norm2, self.mlp.norm)
        return x, self.mlp.normalized(z)


def run_blocks(
    blocks: Sequence[Block], norm: nnx.LayerNorm, x: Float[Array, "b n D"]
) -> Float[Array, "b n D"]:
    """All blocks, and the LayerNorm behind them."""
    y = None
    for block in blocks:
        x, y = block.apart(x, y)
        x = sharding.constrain(x, "batch", None, None)
    return add_norms(x, y, norm)[1]


class ProjectionAttention(nnx.Module):
    """Attention that changes the width: heads averaged where it shrinks, joined where it grows."""

    def __init__(self, din: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        inner, head_dim = max(din, dout), min(din, dout)
        if inner % head_dim:
            raise ValueError(f"{din=} and {dout=}: one must be a multiple of the other")
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.qkv = linear(din, 3 * inner, ("embed", "heads"), **kw)
        self.q_bias = nnx.Param(jnp.zeros(inner, jnp.float32))
        self.v_bias = nnx.Param(jnp.zeros(inner, jnp.float32))
        self.proj = linear(dout, dout, ("embed", None), use_bias=True, **kw)
        self.num_heads = inner // head_dim
        self.average, self.dtype = dout < din, dtype

    def __call__(self, x: Float[Array, "b n din"]) -> Float[Array, "b n dout"]:
        q_bias, v_bias = self.q_bias[...], self.v_bias[...]
        biases = (q_bias, jnp.zeros_like(q_bias), v_bias)
        y = self_attention(x, self.qkv.kernel[...], biases, self.num_heads, self.dtype)
        y = jnp.mean(y, axis=-2) if self.average else y.reshape(*y.shape[:2], -1)
        return self.proj(y)


class AttnProjection(nnx.Module):
    """UniTok's factorisation: attention over an image's tokens into and out of the code space.

    The paper's «multi-head attention modules for token factorization projection» (section 3.1).
    """

    def __init__(self, din: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(din, epsilon=PROJECTION_EPS, **kw)
        self.attn = ProjectionAttention(din, dout, **kw)
        self.norm3 = nnx.LayerNorm(din, epsilon=PROJECTION_EPS, **kw)
        self.proj = linear(din, dout, ("embed", None), use_bias=True, **kw)
        self.norm2 = nnx.LayerNorm(dout, epsilon=PROJECTION_EPS, **kw)
        self.mlp = GeGluMlp(dout, 2 * dout, dout, **kw)

    def __call__(self, x: Float[Array, "b n din"]) -> Float[Array, "b n dout"]:
        x = self.proj(self.norm3(x)) + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MbConv(nnx.Module):
    """Inverted bottleneck with LayerNorm (timm's MbConvLNBlock); stride 2 halves the picture."""

    def __init__(self, din: int, dout: int, stride: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        mid = 4 * dout
        self.pre_norm = nnx.LayerNorm(din, epsilon=BLOCK_EPS, **kw)
        self.conv1_1x1 = conv(din, mid, 1, **kw)
        self.conv2_kxk = conv(mid, mid, 3, stride=stride, depthwise=True, **kw)
        self.conv3_1x1 = conv(mid, dout, 1, **kw)
        self.shortcut = conv(din, dout, 1, **kw) if din != dout else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        short = average_pool(x) if self.stride == 2 else x
        short = short if self.shortcut is None else self.shortcut(short)
        y = gelu(self.conv1_1x1(self.pre_norm(x)))
        y = gelu(self.conv2_kxk(y))
        return short + self.conv3_1x1(y)


class InvMbConv(nnx.Module):
    """The decoder's inverted bottleneck; `up` doubles the picture on both paths."""

    def __init__(self, din: int, dout: int, up: bool, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        mid = 4 * dout
        self.pre_norm = nnx.LayerNorm(din, epsilon=BLOCK_EPS, **kw)
        self.conv1_1x1 = conv(din, mid, 1, **kw)
        self.up = conv(mid, mid, 3, **kw) if up else None
        self.conv2_kxk = conv(mid, mid, 3, depthwise=True, **kw)
        self.conv3_1x1 = conv(mid, dout, 1, **kw)
        if up:
            self.shortcut = conv(din, dout, 3, **kw)
        else:
            self.shortcut = conv(din, dout, 1, **kw) if din != dout else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        y = gelu(self.conv1_1x1(self.pre_norm(x)))
        if self.up is not None and self.shortcut is not None:
            short, y = upsampled_conv(self.shortcut, x), upsampled_conv(self.up, y)
        else:
            short = x if self.shortcut is None else self.shortcut(x)
        y = gelu(self.conv2_kxk(y))
        return short + self.conv3_1x1(y)


class ConvStem(nnx.Module):
    """Stride-2 convolutions: LayerNorm and GELU after each but the last."""

    def __init__(self, channels: Sequence[int], dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        widths = [3, *channels, dim]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.convs = nnx.List([conv(a, b, 3, stride=2, **kw) for a, b in pairs])
        self.norms = nnx.List([nnx.LayerNorm(c, epsilon=BLOCK_EPS, **kw) for c in channels])

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 D"]:
        for layer, norm in zip(self.convs, self.norms, strict=False):
            x = gelu(norm(layer(x)))
        return self.convs[-1](x)


class HybridStem(nnx.Module):
    """ViTamin's stem, MbConv stages and pooling convolution: 1/16 of the size with two stages."""

    def __init__(
        self,
        channels: Sequence[int],
        depths: Sequence[int],
        dim: int,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != len(channels) - 1:
            raise ValueError(f"{depths=} must have one entry per stage, {channels=} one more")
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.conv1 = conv(3, channels[0], 3, stride=2, **kw)
        self.norm1 = nnx.LayerNorm(channels[0], epsilon=BLOCK_EPS, **kw)
        self.conv2 = conv(channels[0], channels[0], 3, **kw)
        self.stages = nnx.List([])
        for din, dout, depth in zip(channels[:-1], channels[1:], depths, strict=True):
            first = MbConv(din, dout, 2, **kw)
            self.stages.append(
                nnx.List([first, *(MbConv(dout, dout, 1, **kw) for _ in range(depth - 1))])
            )
        self.pool_norm = nnx.LayerNorm(channels[-1], epsilon=BLOCK_EPS, **kw)
        self.pool = conv(channels[-1], dim, 3, stride=2, **kw)

    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 D"]:
        x = self.conv2(gelu(self.norm1(self.conv1(x))))
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.pool(self.pool_norm(x))


def depth_to_space(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c4"]:
    """Four channels to 2x2 pixels (sub-pixel convolution, Shi et al. 2016, arXiv:1609.05158)."""
    return rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)


class ConvUp(nnx.Module):
    """Doubling, LayerNorm and GELU for each of `channels`.

    `nearest` doubles before its convolution, as the released decoder does. `shuffle` convolves to
    four times the channels first and lays them out as 2x2 pixels, each with weights of its own:
    it learns faster what differs between neighbours.
    """

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        *,
        shuffle: bool,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        pairs = zip([dim, *channels[:-1]], channels, strict=True)
        factor = 4 if shuffle else 1
        self.convs = nnx.List([conv(a, factor * b, 3, **kw) for a, b in pairs])
        self.norms = nnx.List([nnx.LayerNorm(c, epsilon=BLOCK_EPS, **kw) for c in channels])
        self.shuffle = shuffle

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 c"]:
        for layer, norm in zip(self.convs, self.norms, strict=True):
            x = depth_to_space(layer(x)) if self.shuffle else upsampled_conv(layer, x)
            x = gelu(norm(x))
        return x


class HybridUp(nnx.Module):
    """The released decoder's up_conv1, then InvMbConv stages, each x2: up_conv2 and up_conv3."""

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        depths: Sequence[int],
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != len(channels) - 1:
            raise ValueError(f"{depths=} must have one entry per stage, {channels=} one more")
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.up_conv1 = conv(dim, channels[0], 3, **kw)
        self.stages = nnx.List([])
        for din, width, depth in zip(channels[:-1], channels[1:], depths, strict=True):
            first = InvMbConv(din, width, True, **kw)
            rest = [InvMbConv(width, width, False, **kw) for _ in range(depth - 1)]
            self.stages.append(nnx.List([first, *rest]))

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 c"]:
        x = upsampled_conv(self.up_conv1, x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


def up_path(
    kind: Literal["nearest", "shuffle", "hybrid"],
    dim: int,
    channels: Sequence[int],
    depths: Sequence[int],
    *,
    dtype=jnp.float32,
    rngs: nnx.Rngs,
) -> ConvUp | HybridUp:
    """Layers that double a feature map once for each of `channels`."""
    match kind:
        case "nearest" | "shuffle":
            return ConvUp(dim, channels, shuffle=kind == "shuffle", dtype=dtype, rngs=rngs)
        case "hybrid":
            return HybridUp(dim, channels, depths, dtype=dtype, rngs=rngs)
        case _:
            raise ValueError(f"{kind=} must be nearest, shuffle or hybrid")


class ConvTail(nnx.Module):
    """`ConvUp`, then one more doubling to `dout` channels.

    The last doubling is a sub-pixel convolution either way: at full size a convolution of few
    channels would be most of the time.
    """

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        dout: int,
        *,
        shuffle: bool,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.up = ConvUp(dim, channels, shuffle=shuffle, dtype=dtype, rngs=rngs)
        self.out = conv(channels[-1], 4 * dout, 3, axis=None, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 c"]:
        return depth_to_space(self.out(self.up(x)))


class HybridTail(nnx.Module):
    """`HybridUp`, then up_conv4: one more doubling to `dout` channels."""

    def __init__(
        self,
        dim: int,
        channels: Sequence[int],
        depths: Sequence[int],
        dout: int,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.up = HybridUp(dim, channels, depths, **kw)
        self.conv1 = conv(channels[-1], channels[-1], 3, **kw)
        self.norm1 = nnx.LayerNorm(channels[-1], epsilon=BLOCK_EPS, **kw)
        self.conv2 = conv(channels[-1], dout, 3, axis=None, **kw)

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 c"]:
        x = upsampled_conv(self.conv1, self.up(x))
        return self.conv2(gelu(self.norm1(x)))


class Encoder(nnx.Module):
    """Convolutional stem, then blocks on the grid of patches."""

    def __init__(
        self,
        stem: ConvStem | HybridStem,
        grid: int,
        dim: int,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        *,
        learned_positions: bool,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.patch_embed = stem
        self.pos_embed = learned_embedding(grid, dim, rngs) if learned_positions else None
        self.blocks = nnx.List([Block(dim, num_heads, hidden_dim, **kw) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b n D"]:
        x = self.patch_embed(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [b, n, D]
        if self.pos_embed is not None:
            x = x + self.pos_embed[...].astype(x.dtype)
        return run_blocks(self.blocks, self.norm, x)


class Decoder(nnx.Module):
    """Blocks on the grid of tokens, then upsampling convolutions to the image."""

    def __init__(
        self,
        tail: ConvTail | HybridTail,
        grid: int,
        dim: int,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        *,
        learned_positions: bool,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.pos_embed = learned_embedding(grid, dim, rngs) if learned_positions else None
        self.blocks = nnx.List([Block(dim, num_heads, hidden_dim, **kw) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)
        self.tail = tail

    def __call__(self, x: Float[Array, "b n D"]) -> Float[Array, "b h w 3"]:
        if self.pos_embed is not None:
            x = x + self.pos_embed[...].astype(x.dtype)
        x = run_blocks(self.blocks, self.norm, x)
        grid = math.isqrt(x.shape[1])
        return self.tail(x.reshape(x.shape[0], grid, grid, -1))


def learned_embedding(grid: int, dim: int, rngs: nnx.Rngs) -> nnx.Param:
    """A vector for every place of a square grid, N(0, 0.02)."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (grid * grid, dim), jnp.float32))


class Reconstruction(NamedTuple):
    """What a training step of a tokenizer needs."""

    images: Float[Array, "*b h w 3"]  # not clamped, so that the loss has a gradient everywhere
    tokens: Int[Array, "*b n K"]
    quantizer_loss: Float[Array, ""]
    perplexity: Float[Array, ""]  # of the codes of this batch, at most vocab_size
    stats: quantize.QuantizerStats  # to be kept by `UniTok.with_stats`


class UniTok(nnx.Module):
    """Tokenizer of the UniTok family.

    Args:
      resolution: height and width of the images in pixels.
      stem: `conv` or `hybrid`; the size shrinks by 2^(len(stem_channels) + 1) either way.
      stem_channels: widths before the last convolution, which leads to `dim`.
      stem_depths: MbConv blocks of each stage (`hybrid` only).
      dim, num_blocks, num_heads, hidden_dim: transformer blocks of encoder and decoder.
      tail: `nearest`, `shuffle` (see `ConvUp`) or `hybrid`; the size grows by
        2^(len(tail_channels) + 1) either way.
      tail_depths: InvMbConv blocks of each stage (`hybrid` only).
      num_codebooks, vocab_size: K codebooks of this many vectors each.
      code_dim: width D of all K chunks together; must divide `dim`.
      learned_positions: adds a learned vector per place. The released model has none: its blocks
        know places from the convolutions' padding alone.
    """

    def __init__(
        self,
        resolution: int,
        *,
        stem: Literal["conv", "hybrid"] = "conv",
        stem_channels: Sequence[int],
        stem_depths: Sequence[int] = (),
        dim: int,
        num_blocks: int,
        num_decoder_blocks: int,
        num_heads: int,
        hidden_dim: int,
        tail: Literal["nearest", "shuffle", "hybrid"] = "shuffle",
        tail_channels: Sequence[int],
        tail_depths: Sequence[int] = (),
        num_codebooks: int,
        vocab_size: int,
        code_dim: int,
        commitment: float = 0.25,
        learned_positions: bool = True,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        patch = 2 ** (len(stem_channels) + 1)
        scale = 2 ** (len(tail_channels) + 1)
        if resolution % patch:
            raise ValueError(f"{resolution=} must be a multiple of {patch}, as {stem_channels=}")
        if scale != patch:
            raise ValueError(
                f"{tail_channels=} makes tokens {scale} times as large, but {stem_channels=} "
                f"made images {patch} times smaller"
            )
        grid = resolution // patch
        match stem:
            case "conv":
                encoder_stem = ConvStem(stem_channels, dim, **kw)
            case "hybrid":
                encoder_stem = HybridStem(stem_channels, stem_depths, dim, **kw)
            case _:
                raise ValueError(f"{stem=} must be conv or hybrid")
        match tail:
            case "nearest" | "shuffle":
                decoder_tail = ConvTail(dim, tail_channels, 3, shuffle=tail == "shuffle", **kw)
            case "hybrid":
                decoder_tail = HybridTail(dim, tail_channels, tail_depths, 3, **kw)
            case _:
                raise ValueError(f"{tail=} must be nearest, shuffle or hybrid")
        sizes = (grid, dim)
        blocks: dict[str, Any] = dict(learned_positions=learned_positions, **kw)
        self.encoder = Encoder(encoder_stem, *sizes, num_blocks, num_heads, hidden_dim, **blocks)
        # The projections and the quantiser stay in float32 whatever `dtype` is.
        self.quant_proj = AttnProjection(dim, code_dim, rngs=rngs)
        self.quantizer = quantize.Quantizer(
            num_codebooks, vocab_size, code_dim, commitment=commitment, rngs=rngs
        )
        self.post_quant_proj = AttnProjection(code_dim, dim, rngs=rngs)
        self.decoder = Decoder(
            decoder_tail, *sizes, num_decoder_blocks, num_heads, hidden_dim, **blocks
        )
        self.resolution = resolution
        self.num_tokens = grid * grid

    def _features(self, images: Array) -> Array:
        """Vectors before the quantiser, leading axes folded: [b, n, D]."""
        size = images.shape[-3:-1]
        if size != (self.resolution, self.resolution):
            raise ValueError(f"images of {size}; this tokenizer reads {self.resolution} squared")
        x = sharding.constrain(images.reshape(-1, *images.shape[-3:]), "batch", None, None, None)
        return self.quant_proj(self.encoder(x).astype(jnp.float32))

    def _images(self, codes: Array) -> Array:
        """Pictures of folded codes [b, n, D], not clamped."""
        return self.decoder(self.post_quant_proj(codes)).astype(jnp.float32)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n K"]:
        """Tokens of images in [-1, 1]."""
        tokens = self.quantizer.encode(self._features(images))
        return tokens.reshape(*images.shape[:-3], *tokens.shape[-2:])

    def codes(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b n D"]:
        """Unit-length codebook vectors of the tokens, side by side."""
        return self.quantizer.codes(tokens)

    def decode(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b h w 3"]:
        """Images in [-1, 1]."""
        images = self._images(self.codes(tokens.reshape(-1, *tokens.shape[-2:])))
        return jnp.clip(images, -1.0, 1.0).reshape(*tokens.shape[:-2], *images.shape[-3:])

    def codebooks(self) -> Float[Array, "K vocab d"]:
        """The unit vectors `codes` looks up."""
        return self.quantizer.normalized()

    @property
    def spec(self) -> TokenizerSpec:
        """Needs concrete parameters (not inside `jax.jit`): it holds their hash."""
        return self.described(weights_sha256(self))

    def described(self, weights_sha256: str) -> TokenizerSpec:
        """The spec, for weights whose hash is known."""
        num_codebooks, vocab_size, width = self.quantizer.codebooks[...].shape
        return TokenizerSpec(
            name="unitok",
            resolution=self.resolution,
            num_tokens=self.num_tokens,
            num_codebooks=num_codebooks,
            vocab_size=vocab_size,
            code_dim=num_codebooks * width,
            weights_sha256=weights_sha256,
        )

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Reconstruction:
        """One training pass over images in [-1, 1]; changes nothing in place."""
        quantized = self.quantizer(self._features(images))
        return Reconstruction(
            images=self._images(quantized.codes).reshape(images.shape),
            tokens=quantized.tokens.reshape(*images.shape[:-3], *quantized.tokens.shape[-2:]),
            quantizer_loss=quantized.loss,
            perplexity=quantized.perplexity,
            stats=quantized.stats,
        )

    def with_stats(self, stats: quantize.QuantizerStats) -> "UniTok":
        """The same tokenizer with the usage statistics that `__call__` returned."""
        return self._replace_quantizer(usage=stats.usage, idle_steps=stats.idle_steps)

    def repair(
        self, images: Float[Array, "*b h w 3"], key: Array, *, max_idle_steps: int
    ) -> tuple["UniTok", Int[Array, ""]]:
        """The tokenizer with dead codes re-seeded from these images, and how many there were."""
        codebooks, stats, count = quantize.repair_dead_codes(
            self.codebooks(),
            self.quantizer.stats(),
            self.quantizer.chunks(self._features(images)),
            key,
            max_idle_steps=max_idle_steps,
        )
        return self._replace_quantizer(codebooks=codebooks, **stats._asdict()), count

    def _replace_quantizer(self, **values: Array) -> "UniTok":
        graphdef, state = nnx.split(self)
        for name, value in values.items():
            variable = state["quantizer"][name]
            state["quantizer"][name] = variable.replace(value)  # pyright: ignore[reportCallIssue]
        return nnx.merge(graphdef, state)
