"""Convolutional ends of UniTok: stems from pictures to tokens, and paths from tokens to pictures.

The `Hybrid` ones are the released ViTamin-L tokenizer's layers (FoundationVision/UniTok; timm's
ViTamin), with its names; the `Conv` ones are one plain strided or upsampling convolution a level,
for models that train on a CPU.
"""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax.nn.conv import average_pool, conv, depth_to_space, upsampled_conv
from fourdstar_jax.nn.linear import Common
from fourdstar_jax.nn.vit import BLOCK_EPS, gelu


class MbConv(nnx.Module):
    """Inverted bottleneck with LayerNorm (timm's MbConvLNBlock); stride 2 halves the picture."""

    def __init__(self, din: int, dout: int, stride: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
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
        kw = Common(dtype=dtype, rngs=rngs)
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
    """Stride-2 convolutions: LayerNorm and GELU after each but the last.

    `padding` is that of `nn.conv.conv`, at every level.
    """

    def __init__(
        self,
        channels: Sequence[int],
        dim: int,
        *,
        padding: tuple[int, int] | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        widths = [3, *channels, dim]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.convs = nnx.List([conv(a, b, 3, stride=2, padding=padding, **kw) for a, b in pairs])
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
        kw = Common(dtype=dtype, rngs=rngs)
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
        kw = Common(dtype=dtype, rngs=rngs)
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
        kw = Common(dtype=dtype, rngs=rngs)
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
        kw = Common(dtype=dtype, rngs=rngs)
        self.up = HybridUp(dim, channels, depths, **kw)
        self.conv1 = conv(channels[-1], channels[-1], 3, **kw)
        self.norm1 = nnx.LayerNorm(channels[-1], epsilon=BLOCK_EPS, **kw)
        self.conv2 = conv(channels[-1], dout, 3, axis=None, **kw)

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 c"]:
        x = upsampled_conv(self.conv1, self.up(x))
        return self.conv2(gelu(self.norm1(x)))
