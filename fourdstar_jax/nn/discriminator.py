"""The discriminator of StyleGAN2's form, which tells true pictures from decoded ones.

The paper names StyleGAN's (Karras et al. 2019, arXiv:1812.04948) without its sizes. This is the
residual one of StyleGAN2 (arXiv:1912.04958), in the form that tokenizers train with: MaskGIT's and
MAGVIT's (arXiv:2212.05199), which halve by blur-pool both the branch and what stands beside it.

- Leaky ReLU of slope 0.2 and gain sqrt(2): activations keep their size through any depth.
- No equalised learning rate: weights start at the same size that its run-time gain would give, and
  stay plain kernels, which the optimizer's groups and inference's casts know; the tokenizers above
  train without it.
- No standard deviation over the minibatch: it keeps a generator from making one picture for all,
  which a decoder under pixel losses cannot. Without it a logit depends on its own picture alone:
  on no companion, order, or sharding of the batch, and the R1 penalty is each picture's own.
"""

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax.nn.conv import blur_pool, conv
from fourdstar_jax.nn.linear import Common, Dtype, linear

MAX_SIDE = 8  # pictures are halved until they are smaller
MAX_CHANNELS = 512
CHANNELS_TIMES_SIDE = 16384  # 64 channels at 256 pixels


def activate(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Leaky ReLU that keeps the mean square of normally distributed values, nearly."""
    return math.sqrt(2) * nnx.leaky_relu(x, 0.2)


def channels_at(side: int, multiplier: float) -> int:
    """StyleGAN2's channels of maps of this many pixels a side, times `multiplier`, in eights."""
    return max(8, 8 * round(multiplier * min(MAX_CHANNELS, CHANNELS_TIMES_SIDE / side) / 8))


class DownBlock(nnx.Module):
    """Two 3x3 convolutions, halved between them, beside a halved 1x1 one."""

    def __init__(self, din: int, dout: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        kw = Common(dtype=dtype, rngs=rngs)
        self.conv1 = conv(din, din, 3, **kw)
        self.conv2 = conv(din, dout, 3, **kw)
        self.skip = conv(din, dout, 1, **kw)

    def __call__(self, x: Float[Array, "b h w din"]) -> Float[Array, "b h2 w2 dout"]:
        y = blur_pool(activate(self.conv1(x)))
        y = activate(self.conv2(y))
        return (y + self.skip(blur_pool(x))) * math.sqrt(0.5)


class Discriminator(nnx.Module):
    """One logit a picture, higher for true ones; 24 million parameters at 256 pixels.

    `resolution` is 4 to 7 times a power of two, 16 at least; `multiplier` scales all channels (0.25
    makes 1.5 million parameters). `channels` is 3, or 4 where the pictures come with their alpha.
    The convolutions are computed in `dtype`, the logits in float32.

    Raises ValueError for sizes that it has no form for, and for pictures of another size.
    """

    def __init__(
        self,
        resolution: int,
        *,
        multiplier: float = 1.0,
        channels: int = 3,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sides = [resolution]
        while sides[-1] >= MAX_SIDE and sides[-1] % 2 == 0:
            sides.append(sides[-1] // 2)
        if resolution < 16 or sides[-1] >= MAX_SIDE:
            raise ValueError(
                f"{resolution=} must be 4, 5, 6 or 7 times a power of two, at least 16"
            )
        if channels not in (3, 4):
            raise ValueError(f"{channels=} must be 3 (RGB) or 4 (with alpha)")
        if multiplier <= 0:
            raise ValueError(f"{multiplier=} must be positive")
        kw = Common(dtype=dtype, rngs=rngs)
        widths = [channels_at(side, multiplier) for side in sides]
        dim = widths[-1]
        self.shape = (resolution, resolution, channels)
        self.stem = conv(channels, widths[0], 1, **kw)
        pairs = zip(widths, widths[1:], strict=False)
        self.blocks = nnx.List([DownBlock(a, b, **kw) for a, b in pairs])
        self.last = conv(dim, dim, 3, **kw)
        self.hidden = linear(sides[-1] ** 2 * dim, dim, ("embed", "mlp"), use_bias=True, **kw)
        kw["dtype"] = jnp.promote_types(dtype, jnp.float32)
        self.logit = linear(dim, 1, ("mlp", None), use_bias=True, **kw)

    def __call__(self, images: Float[Array, "*b h w c"]) -> Float[Array, "*b"]:
        """Logits of pictures in [0, 1]."""
        if images.shape[-3:] != self.shape:
            raise ValueError(f"pictures {images.shape[-3:]}; this discriminator sees {self.shape}")
        x = (2 * images - 1).reshape(-1, *self.shape)
        x = activate(self.stem(x))
        for block in self.blocks:
            x = block(x)
        x = activate(self.last(x))
        x = activate(self.hidden(x.reshape(x.shape[0], -1)))
        return self.logit(x).reshape(images.shape[:-3])
