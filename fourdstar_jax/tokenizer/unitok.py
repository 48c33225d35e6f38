"""UniTok: image tokenizer with a hybrid encoder and a multi-codebook quantiser (arXiv:2502.20321).

One family at every size: its layers are those of `nn.vit` and `nn.vitamin`. Names follow the
released state dict (`encoder.blocks.0.attn.qkv`, `quant_proj.mlp.w0`, ...). Pictures are NHWC,
tokens row-major.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fourdstar_jax import sharding
from fourdstar_jax.nn import Common, Dtype
from fourdstar_jax.nn.embedding import learned_embedding
from fourdstar_jax.nn.vit import BLOCK_EPS, AttnProjection, Block, run_blocks
from fourdstar_jax.nn.vitamin import ConvStem, ConvTail, HybridStem, HybridTail
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.base import Codebooks, Reconstruction, replace_quantizer


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
        kw = Common(dtype=dtype, rngs=rngs)
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
        kw = Common(dtype=dtype, rngs=rngs)
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


class UniTok(Codebooks):
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

    name = "unitok"

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
        kw = Common(dtype=dtype, rngs=rngs)
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
        places = learned_positions
        self.encoder = Encoder(
            encoder_stem, *sizes, num_blocks, num_heads, hidden_dim, learned_positions=places, **kw
        )
        # The projections and the quantiser stay in float32 whatever `dtype` is.
        self.quant_proj = AttnProjection(dim, code_dim, rngs=rngs)
        self.quantizer = quantize.Quantizer(
            num_codebooks, vocab_size, code_dim, commitment=commitment, rngs=rngs
        )
        self.post_quant_proj = AttnProjection(code_dim, dim, rngs=rngs)
        self.decoder = Decoder(
            decoder_tail, *sizes, num_decoder_blocks, num_heads, hidden_dim,
            learned_positions=places, **kw,
        )  # fmt: skip
        self.resolution = resolution
        self.num_tokens = grid * grid

    def _features(self, images: Array) -> Array:
        """Vectors [b, n, D] before the quantiser of images in [-1, 1], leading axes folded."""
        size = images.shape[-3:-1]
        if size != (self.resolution, self.resolution):
            raise ValueError(f"images of {size}; this tokenizer reads {self.resolution} squared")
        x = sharding.constrain(images.reshape(-1, *images.shape[-3:]), "batch", None, None, None)
        return self.quant_proj(self.encoder(x).astype(jnp.float32))

    def _images(self, codes: Array) -> Array:
        """Pictures in [-1, 1] of folded codes [b, n, D], not clamped."""
        return self.decoder(self.post_quant_proj(codes)).astype(jnp.float32)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n K"]:
        """Tokens of images in [0, 1]."""
        tokens = self.quantizer.encode(self._features(2 * images - 1))
        return tokens.reshape(*images.shape[:-3], *tokens.shape[-2:])

    def decode(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b h w 3"]:
        """Images in [0, 1]."""
        images = self._images(self.codes(tokens.reshape(-1, *tokens.shape[-2:])))
        return jnp.clip((images + 1) / 2, 0.0, 1.0).reshape(*tokens.shape[:-2], *images.shape[-3:])

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Reconstruction:
        """One training pass over images in [0, 1]; changes nothing in place."""
        quantized = self.quantizer(self._features(2 * images - 1))
        return Reconstruction(
            images=(self._images(quantized.codes).reshape(images.shape) + 1) / 2,
            tokens=quantized.tokens.reshape(*images.shape[:-3], *quantized.tokens.shape[-2:]),
            quantizer_loss=quantized.loss,
            perplexity=quantized.perplexity,
            stats=quantized.stats,
        )

    def repair(
        self, images: Float[Array, "*b h w 3"], key: Array, *, max_idle_steps: int
    ) -> tuple["UniTok", Int[Array, ""]]:
        """The tokenizer with dead codes re-seeded from these images, and how many there were."""
        codebooks, stats, count = quantize.repair_dead_codes(
            self.codebooks(),
            self.quantizer.stats(),
            self.quantizer.chunks(self._features(2 * images - 1)),
            key,
            max_idle_steps=max_idle_steps,
        )
        return replace_quantizer(self, codebooks=codebooks, **stats._asdict()), count
