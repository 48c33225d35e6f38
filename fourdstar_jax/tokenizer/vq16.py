"""VQ-16: LlamaGen's image tokenizer, a convolutional VQ-GAN with one code a token.

Sun et al. 2024 (arXiv:2406.06525; FoundationVision/LlamaGen, tokenizer_image/vq_model.py), after
taming-transformers (Esser et al. 2021, arXiv:2012.09841). Names follow the released state dict
(`encoder.conv_blocks.0.res.1.conv2`, `decoder.mid.1.proj_out`, ...), but `quantizer`, which is
UniTok's with one codebook: the nearest of unit vectors is the one of largest cosine. Pictures are
NHWC, tokens row-major. Here it encodes and decodes; there is no training of it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax import sharding
from fourdstar_jax.nn import Common, Dtype, attend
from fourdstar_jax.nn.conv import conv, upsample
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.base import Codebooks

NORM_GROUPS = 32
NORM_EPS = 1e-6


def group_norm(channels: int, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """GroupNorm of 32 groups. Raises ValueError where `channels` is no multiple of that."""
    if channels % NORM_GROUPS:
        raise ValueError(f"{channels=} must be a multiple of {NORM_GROUPS}, GroupNorm's groups")
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
    return nnx.GroupNorm(
        channels, NORM_GROUPS, epsilon=NORM_EPS, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


class ResBlock(nnx.Module):
    """GroupNorm, swish, 3x3 convolution, twice; a 1x1 convolution beside it changes the width."""

    def __init__(self, din: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
        self.norm1 = group_norm(din, **kw)
        self.conv1 = conv(din, dout, 3, **kw)
        self.norm2 = group_norm(dout, **kw)
        self.conv2 = conv(dout, dout, 3, **kw)
        self.nin_shortcut = conv(din, dout, 1, **kw) if din != dout else None

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h w dout"]:
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttnBlock(nnx.Module):
    """Attention of one head as wide as the picture's channels, over all its pixels."""

    def __init__(self, dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
        self.norm = group_norm(dim, **kw)
        self.q = conv(dim, dim, 1, axis="heads", **kw)
        self.k = conv(dim, dim, 1, axis="heads", **kw)
        self.v = conv(dim, dim, 1, axis="heads", **kw)
        self.proj_out = conv(dim, dim, 1, **kw)

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h w D"]:
        def one_head(y):
            return y.reshape(y.shape[0], -1, 1, y.shape[-1])  # [b, h w, 1, D]

        y = self.norm(x)
        q, k, v = one_head(self.q(y)), one_head(self.k(y)), one_head(self.v(y))
        return x + self.proj_out(attend(q, k, v).reshape(x.shape))


class Downsample(nnx.Module):
    """Half the size by a convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = conv(dim, dim, 3, stride=2, padding=(0, 1), dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h/2 w/2 c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Twice the size, nearest neighbour, then a convolution."""

    def __init__(self, dim: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.conv = conv(dim, dim, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
        return self.conv(upsample(x))


class Level(nnx.Module):
    """Residual blocks at one size, each with attention after it if asked; then a resampling."""

    def __init__(
        self,
        din: int,
        dout: int,
        num_blocks: int,
        *,
        attention: bool,
        down: bool = False,
        up: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        widths = [din] + [dout] * num_blocks
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.res = nnx.List([ResBlock(a, b, **kw) for a, b in pairs])
        self.attn = nnx.List([AttnBlock(dout, **kw) for _ in range(num_blocks if attention else 0)])
        self.downsample = Downsample(dout, **kw) if down else None
        self.upsample = Upsample(dout, **kw) if up else None

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c2"]:
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        if self.downsample is not None:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return sharding.constrain(x, "batch", None, None, None)


def middle(dim: int, *, dtype: Dtype = jnp.float32, rngs: nnx.Rngs) -> nnx.List:
    """The layers at the lowest size between the levels and the code: block, attention, block."""
    kw = Common(dtype=dtype, rngs=rngs)
    return nnx.List([ResBlock(dim, dim, **kw), AttnBlock(dim, **kw), ResBlock(dim, dim, **kw)])


class Encoder(nnx.Module):
    """Images to `z_dim` channels at 1 / 2^(levels - 1) of the size; attention at the last level."""

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        num_blocks: int,
        z_dim: int,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        widths = [channels, *(channels * m for m in multipliers)]
        last = len(multipliers) - 1
        self.conv_in = conv(3, channels, 3, **kw)
        self.conv_blocks = nnx.List([])
        for i, (din, dout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            self.conv_blocks.append(
                Level(din, dout, num_blocks, attention=i == last, down=i < last, **kw)
            )
        self.mid = middle(widths[-1], **kw)
        self.norm_out = group_norm(widths[-1], **kw)
        self.conv_out = conv(widths[-1], z_dim, 3, axis=None, **kw)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h2 w2 Z"]:
        x = self.conv_in(images)
        for block in [*self.conv_blocks, *self.mid]:
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """The encoder turned round, with one residual block more a level; `conv_blocks[0]` is lowest.

    Every block of the lowest level has attention after it, three with VQ-16's sizes.
    """

    def __init__(
        self,
        channels: int,
        multipliers: Sequence[int],
        num_blocks: int,
        z_dim: int,
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        widths = [channels * m for m in reversed(multipliers)]
        widths = [widths[0], *widths]
        last = len(multipliers) - 1
        self.conv_in = conv(z_dim, widths[0], 3, **kw)
        self.mid = middle(widths[0], **kw)
        self.conv_blocks = nnx.List([])
        for i, (din, dout) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            self.conv_blocks.append(
                Level(din, dout, num_blocks + 1, attention=i == 0, up=i < last, **kw)
            )
        self.norm_out = group_norm(widths[-1], **kw)
        self.conv_out = conv(widths[-1], 3, 3, axis=None, **kw)

    def __call__(self, z: Float[Array, "b h w Z"]) -> Float[Array, "b h2 w2 3"]:
        x = self.conv_in(z)
        for block in [*self.mid, *self.conv_blocks]:
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class VQ16(Codebooks):
    """Tokenizer of LlamaGen's VQ family: one code of `code_dim` a token (K = 1).

    Args:
      resolution: height and width of the images in pixels; the layers hold for any.
      channels: of the first and the last level; a multiple of 32.
      multipliers: channels of each level by this number, from the images down. Each level but the
        last halves the size, so that five make VQ-16.
      num_blocks: residual blocks a level in the encoder; the decoder has one more.
      z_dim: channels between the convolutions and the code.
      vocab_size, code_dim: the codebook, unit vectors.
      dtype: of the convolutions and of the attention; what surrounds the quantiser is float32.

    Raises ValueError for sizes that do not divide.
    """

    name = "vq16"

    def __init__(
        self,
        resolution: int,
        *,
        channels: int,
        multipliers: Sequence[int],
        num_blocks: int,
        z_dim: int,
        vocab_size: int,
        code_dim: int,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        patch = 2 ** (len(multipliers) - 1)
        if resolution % patch:
            raise ValueError(f"{resolution=} must be a multiple of {patch}, as {multipliers=}")
        sizes = (channels, multipliers, num_blocks, z_dim)
        self.encoder = Encoder(*sizes, dtype=dtype, rngs=rngs)
        # Between encoder and decoder all is float32 whatever `dtype` is.
        self.quant_conv = conv(z_dim, code_dim, 1, axis=None, rngs=rngs)
        self.quantizer = quantize.Quantizer(1, vocab_size, code_dim, rngs=rngs)
        self.post_quant_conv = conv(code_dim, z_dim, 1, axis=None, rngs=rngs)
        self.decoder = Decoder(*sizes, dtype=dtype, rngs=rngs)
        self.resolution = resolution
        self.grid = resolution // patch
        self.num_tokens = self.grid**2

    def _features(self, images: Array) -> Array:
        """Vectors [b, n, D] before the quantiser of images in [-1, 1], leading axes folded."""
        size = images.shape[-3:-1]
        if size != (self.resolution, self.resolution):
            raise ValueError(f"images of {size}; this tokenizer reads {self.resolution} squared")
        x = sharding.constrain(images.reshape(-1, *images.shape[-3:]), "batch", None, None, None)
        x = self.quant_conv(self.encoder(x).astype(jnp.float32))
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _images(self, codes: Array) -> Array:
        """Pictures in [-1, 1] of folded codes [b, n, D], not clamped."""
        x = codes.reshape(codes.shape[0], self.grid, self.grid, -1)
        return self.decoder(self.post_quant_conv(x)).astype(jnp.float32)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n 1"]:
        """Tokens of images in [0, 1]. Raises ValueError for images of another size."""
        tokens = self.quantizer.encode(self._features(2 * images - 1))
        return tokens.reshape(*images.shape[:-3], *tokens.shape[-2:])

    def decode(self, tokens: Int[Array, "*b n 1"]) -> Float[Array, "*b h w 3"]:
        """Images in [0, 1]."""
        images = self._images(self.codes(tokens.reshape(-1, *tokens.shape[-2:])))
        return jnp.clip((images + 1) / 2, 0.0, 1.0).reshape(*tokens.shape[:-2], *images.shape[-3:])
