"""The local tokenizer: a patch's code is a matter of the patch, and blank patches share one.

For models that train from scratch on objects before white. A UniTok of their size lets a change of
one patch reach the codes of all others, and stores bits in the background; here

- the encoder is a convolutional stem alone, without attention or positions: a token sees its patch
  of p x p pixels, p / 2 pixels before it and p / 2 - 1 behind it either way, and white outside the
  picture. A change of one patch changes at most the codes of the 3 x 3 patches around it, and a
  picture moved by whole patches has its codes moved with it;
- a patch that is white by its own pixels gets the code `quantize.BLANK` of every codebook, which
  no other patch does. It is out of the codebooks' statistics, loss and repair, its code vector is
  constant, and it comes out of `decode` white.

Pictures are NHWC, tokens row-major. The decoder is convolutional, too, with MbConv blocks at the
grid of tokens; the quantizer is UniTok's.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import sharding
from fourdstar_jax.nn import Common, Dtype
from fourdstar_jax.nn.vit import BLOCK_EPS, TokenProjection
from fourdstar_jax.nn.vitamin import ConvStem, ConvTail, MbConv
from fourdstar_jax.tokenizer import quantize
from fourdstar_jax.tokenizer.base import Codebooks, Reconstruction, replace_quantizer
from fourdstar_jax.tokenizer.measures import blank_patches


class Decoder(nnx.Module):
    """MbConv blocks on the grid of tokens, then sub-pixel convolutions to the image."""

    def __init__(
        self,
        dim: int,
        num_blocks: int,
        channels: Sequence[int],
        *,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([MbConv(dim, dim, 1, **kw) for _ in range(num_blocks)])
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)
        self.tail = ConvTail(dim, channels, 3, shuffle=True, **kw)

    def __call__(self, x: Float[Array, "b h w D"]) -> Float[Array, "b h2 w2 3"]:
        for block in self.blocks:
            x = block(x)
        return self.tail(self.norm(x))


class LocalTokenizer(Codebooks):
    """Tokenizer whose codes depend on a patch and its surroundings only.

    Args:
      resolution: height and width of the images in pixels.
      stem_channels: widths before the last convolution, which leads to `dim`; a patch has
        2^(len(stem_channels) + 1) pixels a side.
      dim: width of encoder and decoder at the grid of tokens.
      num_decoder_blocks: MbConv blocks of the decoder there.
      tail_channels: as many widths from `dim` back to the image.
      num_codebooks, vocab_size: K codebooks of this many vectors each, the blank one among them.
      code_dim: width D of all K chunks together.

    Raises ValueError for sizes that do not fit together.
    """

    name = "local"
    has_blank = True

    def __init__(
        self,
        resolution: int,
        *,
        stem_channels: Sequence[int],
        dim: int,
        num_decoder_blocks: int,
        tail_channels: Sequence[int],
        num_codebooks: int,
        vocab_size: int,
        code_dim: int,
        commitment: float = 0.25,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kw = Common(dtype=dtype, rngs=rngs)
        patch = 2 ** (len(stem_channels) + 1)
        if resolution % patch:
            raise ValueError(f"{resolution=} must be a multiple of {patch}, as {stem_channels=}")
        if len(tail_channels) != len(stem_channels):
            raise ValueError(f"{tail_channels=} must be as many as {stem_channels=}")
        if vocab_size < 2:
            raise ValueError(f"{vocab_size=} must be at least 2: one code is that of blank patches")
        # Without padding: `_features` pads the picture itself, with white.
        self.encoder = ConvStem(stem_channels, dim, padding=(0, 0), **kw)
        # The projections and the quantizer stay in float32 whatever `dtype` is.
        self.quant_proj = TokenProjection(dim, code_dim, rngs=rngs)
        self.quantizer = quantize.Quantizer(
            num_codebooks, vocab_size, code_dim, commitment=commitment, rngs=rngs
        )
        self.post_quant_proj = TokenProjection(code_dim, dim, rngs=rngs)
        self.decoder = Decoder(dim, num_decoder_blocks, tail_channels, **kw)
        self.resolution = resolution
        self.patch = patch
        self.grid = resolution // patch
        self.num_tokens = self.grid**2

    def blank(self, images: Float[Array, "*b h w 3"]) -> Bool[Array, "*b n"]:
        """Whether patches of images in [0, 1] are blank, from their own pixels."""
        return blank_patches(images, self.grid)

    def _features(self, images: Array) -> Array:
        """Vectors [b, n, D] before the quantizer of folded images in [0, 1]."""
        size = images.shape[-3:-1]
        if size != (self.resolution, self.resolution):
            raise ValueError(f"images of {size}; this tokenizer reads {self.resolution} squared")
        before = self.patch // 2
        margin = (before, self.patch - 1 - before)
        x = jnp.pad(2 * (images - 1), ((0, 0), margin, margin, (0, 0)))  # white is 0
        x = self.encoder(sharding.constrain(x, "batch", None, None, None))
        return self.quant_proj(x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32))

    def _images(self, codes: Array, blank: Array) -> Array:
        """Pictures in [0, 1], not clamped, of folded codes [b, n, D]; white where blank [b, n]."""
        x = self.post_quant_proj(codes)
        x = self.decoder(rearrange(x, "b (h w) c -> b h w c", h=self.grid))
        white = rearrange(blank, "b (h w) -> b h w 1", h=self.grid)
        white = jnp.repeat(jnp.repeat(white, self.patch, axis=1), self.patch, axis=2)
        return jnp.where(white, 1.0, (x.astype(jnp.float32) + 1) / 2)

    def encode(self, images: Float[Array, "*b h w 3"]) -> Int[Array, "*b n K"]:
        """Tokens of images in [0, 1]. Raises ValueError for images of another size."""
        flat = images.reshape(-1, *images.shape[-3:])
        tokens = self.quantizer.encode(self._features(flat), self.blank(flat))
        return tokens.reshape(*images.shape[:-3], *tokens.shape[-2:])

    def decode(self, tokens: Int[Array, "*b n K"]) -> Float[Array, "*b h w 3"]:
        """Images in [0, 1]."""
        flat = tokens.reshape(-1, *tokens.shape[-2:])
        images = self._images(self.codes(flat), jnp.all(flat == quantize.BLANK, axis=-1))
        return jnp.clip(images, 0.0, 1.0).reshape(*tokens.shape[:-2], *images.shape[-3:])

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Reconstruction:
        """One training pass over images in [0, 1]; changes nothing in place."""
        flat = images.reshape(-1, *images.shape[-3:])
        features, blank = self._features(flat), self.blank(flat)
        quantized = self.quantizer(features, blank)
        return Reconstruction(
            images=self._images(quantized.codes, blank).reshape(images.shape),
            tokens=quantized.tokens.reshape(*images.shape[:-3], *quantized.tokens.shape[-2:]),
            quantizer_loss=quantized.loss,
            perplexity=quantized.perplexity,
            stats=quantized.stats,
        )

    def repair(
        self, images: Float[Array, "*b h w 3"], key: jax.Array, *, max_idle_steps: int
    ) -> tuple["LocalTokenizer", Int[Array, ""]]:
        """The tokenizer with dead codes re-seeded from the object patches of these images.

        With it comes how many there were.
        """
        flat = images.reshape(-1, *images.shape[-3:])
        codebooks, stats, count = quantize.repair_dead_codes(
            self.codebooks(),
            self.quantizer.stats(),
            self.quantizer.chunks(self._features(flat)),
            key,
            max_idle_steps=max_idle_steps,
            blank=self.blank(flat),
        )
        return replace_quantizer(self, codebooks=codebooks, **stats._asdict()), count
