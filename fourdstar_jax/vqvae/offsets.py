"""The Spatial-Temporal Offset Predictor (STOP): per-timestep corrections of the static Gaussians.

Paper section 3.1. The static Gaussians of a view ask the tokens of all timesteps of that view
(cross-attention), a 3D U-Net over time, rows and columns refines the answer, and the result is
added to the Gaussians before their activations, so that every parameter stays valid. Time is never
compressed. The last convolution starts at zero: without training the output is the static one.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax import sharding
from fourdstar_jax.nn import Attention, Common, Dtype, Mlp, linear, recomputed
from fourdstar_jax.nn.conv import conv, upsample
from fourdstar_jax.nn.embedding import sincos
from fourdstar_jax.nn.vit import SelfAttention
from fourdstar_jax.vqvae.decoder import NUM_CHANNELS, OPACITY, ROTATION, StaticMaps, in_parts

# Root mean square of the raw channels of a trained decoder, by kind.
RAW_SIZE = np.ones(NUM_CHANNELS, np.float32)
RAW_SIZE[OPACITY], RAW_SIZE[ROTATION] = 5.7, 3.5
MAX_PERIOD = 1000.0  # of the encodings below; 24 timesteps and 16 rows use a part of one turn


def waves(x: Float[Array, "*b"], dim: int) -> Float[Array, "*b {dim}"]:
    """Sines and cosines of x at dim/2 frequencies between 1 and 1/MAX_PERIOD."""
    return sincos(x, MAX_PERIOD ** -(jnp.arange(dim // 2) / (dim // 2)))


def place_and_time(times: Float[Array, "B T"], grid: int, dim: int) -> Float[Array, "B T n {dim}"]:
    """Encoding of a token's frame time plus that of its row and column."""
    index = jnp.arange(grid, dtype=jnp.float32)
    side = waves(index, dim // 2)
    rows = jnp.broadcast_to(side[:, None], (grid, grid, dim // 2))
    columns = jnp.broadcast_to(side[None], (grid, grid, dim // 2))
    place = jnp.concatenate([rows, columns], axis=-1).reshape(grid * grid, dim)
    return waves(times, dim)[:, :, None] + place


class CrossLayer(nnx.Module):
    """Pre-norm cross-attention and feed-forward."""

    def __init__(self, dim: int, num_heads: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
        self.norm1 = nnx.LayerNorm(dim, **kw)
        self.context_norm = nnx.LayerNorm(dim, **kw)
        self.attn = Attention(dim, num_heads, **kw)
        self.norm2 = nnx.LayerNorm(dim, **kw)
        self.mlp = Mlp(dim, 4 * dim, dim, **kw)

    def __call__(
        self, x: Float[Array, "b L D"], context: Float[Array, "b S D"]
    ) -> Float[Array, "b L D"]:
        x = x + self.attn(self.norm1(x), self.context_norm(context))
        return x + self.mlp(self.norm2(x))


class Conv3d(nnx.Module):
    """3x3x3 convolution over (time, row, column), zeros beyond the edges.

    Done as a 2D convolution of the three timesteps side by side: the same sums, and several times
    faster where 3D convolutions are slow.
    """

    def __init__(
        self, din: int, dout: int, *, zero: bool = False, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        if zero:
            kernel = jnp.zeros((3, 3, 3, din, dout), jnp.float32)
        else:
            init = nnx.initializers.lecun_normal()  # fan-in: everything but the last axis
            kernel = init(rngs.params(), (3, 3, 3, din, dout), jnp.float32)
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros(dout, jnp.float32))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b T h w c"]) -> Float[Array, "b T h w c2"]:
        b, t = x.shape[:2]
        x = x.astype(self.dtype)
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        x = jnp.concatenate([padded[:, i : i + t] for i in range(3)], axis=-1)
        kernel = rearrange(self.kernel[...].astype(self.dtype), "t i j c d -> i j (t c) d")
        y = jax.lax.conv_general_dilated(
            x.reshape(b * t, *x.shape[2:]),
            kernel,
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(b, t, *y.shape[1:]) + self.bias[...].astype(self.dtype)


def per_frame(layer, x: Float[Array, "b T h w c"]) -> Float[Array, "b T h2 w2 c2"]:
    """A picture layer on every timestep."""
    y = layer(x.reshape(-1, *x.shape[2:]))
    return y.reshape(*x.shape[:2], *y.shape[1:])


class ResBlock3d(nnx.Module):
    """Twice GroupNorm, SiLU, 3x3x3 convolution, around a shortcut."""

    def __init__(self, din: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
        self.norm1 = nnx.GroupNorm(din, num_groups=math.gcd(8, din), **kw)
        self.conv1 = Conv3d(din, dout, **kw)
        self.norm2 = nnx.GroupNorm(dout, num_groups=math.gcd(8, dout), **kw)
        self.conv2 = Conv3d(dout, dout, **kw)
        self.shortcut = linear(din, dout, (None, None), **kw) if din != dout else None

    def __call__(self, x: Float[Array, "b T h w c"]) -> Float[Array, "b T h w c2"]:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class UNet3d(nnx.Module):
    """U-Net over (T, h, w) that halves rows and columns only; views are folded into the batch.

    Only at its lowest level do the views meet, in one attention over V at each place. With
    `remat` one view after the other goes down, and up, and again so in the backward pass.
    """

    def __init__(
        self,
        din: int,
        dout: int,
        channels: Sequence[int],
        num_blocks: int,
        *,
        remat: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)

        def blocks(width_in, width_out):
            widths = [width_in] + [width_out] * (num_blocks - 1)
            return nnx.List([ResBlock3d(width, width_out, **kw) for width in widths])

        self.stem = Conv3d(din, channels[0], **kw)
        pairs = list(zip(channels[:-1], channels[1:], strict=True))
        self.down_blocks = nnx.List([blocks(c, c) for c in channels[:-1]])
        self.downs = nnx.List([conv(a, b, 3, stride=2, **kw) for a, b in pairs])
        self.middle = blocks(channels[-1], channels[-1])
        self.view_norm = nnx.LayerNorm(channels[-1], **kw)
        self.view_attn = SelfAttention(channels[-1], max(1, channels[-1] // 16), **kw)
        self.ups = nnx.List([conv(b, a, 3, **kw) for a, b in reversed(pairs)])
        self.up_blocks = nnx.List([blocks(2 * a, a) for a, _ in reversed(pairs)])
        self.norm = nnx.GroupNorm(channels[0], num_groups=math.gcd(8, channels[0]), **kw)
        self.out = Conv3d(channels[0], dout, zero=True, rngs=rngs)
        self.remat = remat

    def __call__(
        self, x: Float[Array, "BV T h w c"], num_views: int
    ) -> Float[Array, "BV T h w c2"]:
        def split(x):
            return x.reshape(-1, num_views, *x.shape[1:])

        size = 1 if self.remat else None
        x, skips = in_parts(self._down, size, split(x))  # [B, V, ...]
        t, h, w = x.shape[2:5]
        y = rearrange(self.view_norm(x), "b v t h w c -> (b t h w) v c")
        y = self.view_attn(y)
        x = x + rearrange(y, "(b t h w) v c -> b v t h w c", t=t, h=h, w=w)
        x = in_parts(self._up, size, x, skips)
        return x.reshape(-1, *x.shape[2:])

    def _down(self, x):
        """The lowest level, and what was there before each halving."""
        x = self.stem(x)
        skips = []
        for level, down in zip(self.down_blocks, self.downs, strict=True):
            for block in level:
                x = block(x)
            skips.append(x)
            x = per_frame(down, x)
        for block in self.middle:
            x = block(x)
        return x, skips

    def _up(self, x, skips):
        for up, level, skip in zip(self.ups, self.up_blocks, reversed(skips), strict=True):
            x = per_frame(lambda a, up=up: up(upsample(a)), x)
            x = jnp.concatenate([skip, x], axis=-1)
            for block in level:
                x = block(x)
        return self.out(nnx.silu(self.norm(x)).astype(jnp.float32))


class OffsetPredictor(nnx.Module):
    """Static Gaussian maps and the tokens of all timesteps to offsets of every Gaussian.

    Args:
      grid, map_size: tokens and Gaussians a side of one view; a query is a patch of the map.
      token_dim: width of the continuous tokens.
      feature_dim: width of the decoder's features that join the queries; 0 leaves them out.
      scaled: counts raw channels, in and out, in their usual size. Of opacities and rotations it
        is several times that of colours, which queries and U-Net would hardly see.
      attention: `full` over time and place of the view, or `axial_time`: the same place at all
        times, which costs n times less.
      unet_channels: widths of the U-Net's levels, each half the size of the one before.
      remat: makes what lies within layers and blocks again in the backward pass.
    """

    def __init__(
        self,
        grid: int,
        map_size: int,
        token_dim: int,
        feature_dim: int,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        attention: Literal["full", "axial_time"] = "full",
        scaled: bool = False,
        coarse_channels: int = 16,
        unet_channels: Sequence[int],
        unet_blocks: int,
        remat: bool = False,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        shrink = 2 ** (len(unet_channels) - 1)
        if map_size % grid or map_size % shrink:
            raise ValueError(f"{map_size=} must be a multiple of {grid=} and of {shrink}")
        if dim % 4:
            raise ValueError(f"offset {dim=} must be a multiple of 4 (sines and cosines)")
        if attention not in ("full", "axial_time"):
            raise ValueError(f"{attention=} must be full or axial_time")
        kw = Common(dtype=dtype, rngs=rngs)
        patch = map_size // grid
        query_dim = patch * patch * (NUM_CHANNELS + feature_dim)
        self.query = linear(query_dim, dim, (None, "embed"), use_bias=True, **kw)
        self.context = linear(token_dim, dim, ("embed", None), use_bias=True, **kw)
        self.layers = nnx.List([CrossLayer(dim, num_heads, **kw) for _ in range(num_layers)])
        self.norm = nnx.LayerNorm(dim, **kw)
        self.unpatch = linear(
            dim, patch * patch * coarse_channels, ("embed", None), use_bias=True, **kw
        )
        self.unet = UNet3d(
            coarse_channels + NUM_CHANNELS,
            NUM_CHANNELS,
            unet_channels,
            unet_blocks,
            remat=remat,
            **kw,
        )
        self.dim = dim
        self.patch = patch
        self.attention = attention
        self.use_features = feature_dim > 0
        self.scaled = scaled
        self.remat = remat

    def __call__(
        self, static: StaticMaps, times: Float[Array, "B T"]
    ) -> Float[Array, "B T V m m 14"]:
        b, t, v, m = static.raw.shape[:4]
        grid = m // self.patch
        maps = static.raw / RAW_SIZE if self.scaled else static.raw
        raw = rearrange(maps, "b t v h w c -> (b v) t h w c")
        if self.use_features:
            # Of the type in which the queries are made: the features are large.
            parts = maps.astype(self.query.dtype), static.features.astype(self.query.dtype)
            maps = jnp.concatenate(parts, axis=-1)
        queries = rearrange(
            maps, "b t v (i p) (j q) c -> b v t (i j) (p q c)", p=self.patch, q=self.patch
        )
        where = place_and_time(times, grid, self.dim)[:, None]  # [B, 1, T, n, D]
        x = self.query(queries) + where
        context = self.context(jnp.moveaxis(static.tokens, 2, 1)) + where
        fold = {
            "full": "b v t n d -> (b v) (t n) d",
            "axial_time": "b v t n d -> (b v n) t d",
        }[self.attention]
        sizes: dict[str, Any] = dict(b=b, v=v, t=t, n=grid * grid)
        x, context = rearrange(x, fold), rearrange(context, fold)
        run = recomputed(lambda layer, x, context: layer(x, context), self.remat)
        for layer in self.layers:
            x = sharding.constrain(run(layer, x, context), "batch", None, None)
        left, right = fold.split(" -> ")
        x = rearrange(self.norm(x), f"{right} -> {left}", **sizes)
        coarse = rearrange(
            self.unpatch(x),
            "b v t (i j) (p q c) -> (b v) t (i p) (j q) c",
            i=grid,
            p=self.patch,
            q=self.patch,
        )
        offsets = self.unet(jnp.concatenate([coarse, raw.astype(coarse.dtype)], axis=-1), v)
        offsets = rearrange(offsets, "(b v) t h w c -> b t v h w c", v=v)
        return offsets * RAW_SIZE if self.scaled else offsets
