"""What STAR's sequence is made of: text, image tokens, rays, timesteps and their coordinates."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax import nn
from fourdstar_jax.nn.embedding import patch_rays, sincos
from fourdstar_jax.types import Cameras

PAD_ID = 0  # T5's; text ids are padded with it
# Longest period of the timestep sinusoids, in frames: an order above the longest clip.
MAX_PERIOD = 256.0


class Codebook(nnx.Variable):
    """The image tokenizer's frozen codebooks `[K, vocab, D/K]`; no parameter of STAR's."""


def vector(key, *shape: int, std: float = 0.02, axes: tuple | None = None) -> nnx.Param:
    """A learned array from N(0, std)."""
    axes = axes if axes is not None else (None,) * len(shape)
    init = nnx.with_partitioning(nnx.initializers.normal(std), axes)
    return nnx.Param(init(key, shape, jnp.float32))


def gain(dim: int, start: float, *, dtype, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """Brings vectors to one root mean square, then a learned gain a channel, `start` at first."""
    init = nnx.initializers.constant(start)
    return nnx.RMSNorm(dim, epsilon=1e-6, dtype=dtype, scale_init=init, rngs=rngs)


class TextPrefix(nnx.Module):
    """Text tokenizer (paper 3.2.1): an MLP over features of L text slots.

    Features are rows of a learned table plus a vector for the slot (`words`: a table alone would
    not know the order), or come precomputed from a T5 encoder (`t5`). A padded slot holds a learned
    vector and stays visible, so that no attention mask depends on the text. A dropped text
    (classifier-free guidance) holds another learned vector in every slot.
    """

    def __init__(
        self, encoder: str, *, vocab_size: int, length: int, text_dim: int, dim: int, dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if encoder not in ("words", "t5"):
            raise ValueError(f"text_encoder={encoder!r} must be 'words' or 't5'")
        if encoder == "words":
            if vocab_size < 1:
                raise ValueError(f"text_vocab={vocab_size} must be positive: it counts the words")
            self.table = vector(rngs.params(), vocab_size, text_dim, std=1.0, axes=("vocab", None))
            self.slots = vector(rngs.params(), length, text_dim, std=1.0)
        self.pad = vector(rngs.params(), text_dim, std=1.0)
        self.null = vector(rngs.params(), text_dim, std=1.0)
        self.mlp = nn.Mlp(text_dim, dim, dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.encoder, self.length = encoder, length

    def __call__(
        self,
        ids: Int[Array, "B L"],
        features: Float[Array, "B L C"] | None,
        drop: Bool[Array, " B"] | None,
    ) -> Float[Array, "B L D"]:
        if ids.shape[1] != self.length:
            raise ValueError(f"text_ids have {ids.shape[1]} slots; the model takes {self.length}")
        if self.encoder == "words":
            if features is not None:
                raise ValueError("text_features are given, but this model's text encoder is words")
            features = self.table[...][ids] + self.slots[...]
        if features is None:
            raise ValueError("text_features must be given: this model's text encoder is t5")
        features = jnp.where((ids == PAD_ID)[..., None], self.pad[...], features)
        if drop is not None:
            features = jnp.where(drop[:, None, None], self.null[...], features)
        return self.mlp(features)


class RayEncoder(nnx.Module):
    """Plücker rays of a view's pixels through one patch convolution (as MVAR): one vector a token.

    With `octaves` > 0 a linear map of sines and cosines of the patch's mean ray, at doubling
    frequencies, is added: the rays of neighbouring patches alone differ by a few per cent. 0 is the
    paper's form.
    """

    def __init__(
        self, resolution: int, grid: int, dim: int, *, octaves: int, std: float, dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        if resolution % grid:
            raise ValueError(f"{resolution=} must be a multiple of {grid=}")
        patch = resolution // grid
        init = nnx.initializers.normal(std)
        kw = nn.Common(dtype=dtype, rngs=rngs)
        self.conv = nn.linear(patch * patch * 6, dim, (None, "embed"), init=init, **kw)
        self.waves = nn.linear(12 * octaves, dim, (None, "embed"), **kw) if octaves else None
        self.resolution, self.grid, self.octaves = resolution, grid, octaves

    def __call__(self, cameras: Cameras) -> tuple[Float[Array, "B N D"], Float[Array, "B N 6"]]:
        """The vectors, tokens view by view, and the patches' mean rays.

        Cameras' intrinsics are those of images of `resolution` pixels.
        """
        x = patch_rays(cameras, resolution=self.resolution, grid=self.grid)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])  # [B, N, P, 6]
        y, mean = self.conv(jnp.reshape(x, (*x.shape[:2], -1))), x.mean(axis=2)
        if self.waves is None:
            return y, mean
        frequencies = np.pi * 2.0 ** np.arange(self.octaves, dtype=np.float32)
        angles = (mean[..., None] * frequencies).reshape(*y.shape[:2], -1)
        return y + self.waves(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)), mean


class TimeEncoder(nnx.Module):
    """Timestep encoder (paper 3.2.1): sinusoids of the frame time, then Linear, SiLU, Linear.

    Times are seconds since the first frame multiplied by the frame rate, so that frame i is i
    whatever the number of frames.
    """

    def __init__(self, features: int, dim: int, *, dtype, rngs: nnx.Rngs):
        if features % 2:
            raise ValueError(f"time_features={features} must be even")
        self.up = nn.linear(features, dim, ("embed", "mlp"), use_bias=True, dtype=dtype, rngs=rngs)
        self.down = nn.linear(dim, dim, ("mlp", "embed"), use_bias=True, dtype=dtype, rngs=rngs)
        self.features = features

    def __call__(self, times: Float[Array, "*b"]) -> Float[Array, "*b D"]:
        half = self.features // 2
        frequencies = jnp.asarray(MAX_PERIOD ** (-np.arange(half, dtype=np.float32) / half))
        waves = sincos(times.astype(jnp.float32), frequencies)
        return self.down(nnx.silu(self.up(waves)))


def token_coordinates(
    times: Float[Array, "B T"], num_views: int, rows: int, columns: int
) -> Float[Array, "B T N 4"]:
    """Time, view, row and column of every token, for rotary embeddings."""
    view, row, column = jnp.meshgrid(
        jnp.arange(num_views), jnp.arange(rows), jnp.arange(columns), indexing="ij"
    )
    place = jnp.stack([view, row, column], axis=-1).reshape(-1, 3).astype(jnp.float32)
    shape = (*times.shape, place.shape[0])
    time = jnp.broadcast_to(times[..., None, None], (*shape, 1))
    return jnp.concatenate([time, jnp.broadcast_to(place, (*shape, 3))], axis=-1)
