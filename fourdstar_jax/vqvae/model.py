"""4D VQ-VAE: the codes of a spatial-temporal matrix of views to 3D Gaussians that move.

Paper section 3.1: the encoder is a frozen image tokenizer (`tokenizer/`), the decoder is the
spatial-temporal decoder here: static Gaussians for every timestep (`decoder.py`), then the offsets
that turn them into one object over time (`offsets.py`).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax import geometry
from fourdstar_jax.nn import Dtype
from fourdstar_jax.types import Cameras, Gaussians
from fourdstar_jax.vqvae.decoder import StaticDecoder, activate
from fourdstar_jax.vqvae.offsets import OffsetPredictor


class Decoded(NamedTuple):
    """Both in the cameras' world frame, `[B, T, G, ...]` with G = V m m, view-major."""

    coarse: Gaussians  # static Gaussians of each timestep alone
    gaussians: Gaussians  # with the offsets: Gaussian g is the same one at every timestep. Without
    # an offset predictor they are the coarse ones.


def canonical_frame(
    cameras: Cameras,
) -> tuple[Cameras, Float[Array, "*b 4 4"]]:
    """The rig turned so that view 0 stands at [0, 0, r] and looks at the origin, and the way back.

    r is view 0's distance to the origin. The second value takes the turned frame to the original.
    Rigs that are relative to the input view already, as the data's are, do not change.
    """
    first = cameras.viewmats[..., :1, :, :]  # [..., 1, 4, 4]
    radius = jnp.linalg.norm(first[..., :3, 3], axis=-1)
    front = jnp.diag(jnp.array([1.0, -1.0, -1.0, 1.0]))
    front = jnp.broadcast_to(front, first.shape).at[..., 2, 3].set(radius)
    back = geometry.invert_rigid(first) @ front
    return cameras._replace(viewmats=cameras.viewmats @ back), back[..., 0, :, :]


class VQVAE4D(nnx.Module):
    """The trainable decoder of the 4D VQ-VAE. No parameter depends on how many frames or views.

    Args:
      resolution: size of the images that `Ks` of the cameras belong to.
      grid: tokens a side of one view; `code_dim`: width D of a code.
      dim, num_blocks, num_heads, hidden_dim, view_attention_every: blocks of the static decoder.
      up, up_channels, up_depths: its upsampling path (see `nn.vitamin.up_path`); the map has
        `grid * 2 ** len(up_channels)` Gaussians a side. `up_pictures` of an object go through it
        at a time, again in the backward pass; None: all at once, kept.
      projection: codes to `dim`, by UniTok's attention over an image's tokens or each alone.
      offsets: whether there is an offset predictor; without, `unet_*` and `offset_*` are not used.
      offset_*: the offset predictor's cross-attention; `offset_features` lets its queries see the
        decoder's features beside the Gaussians, `offset_scaled` counts channels in their usual
        size. unet_channels, unet_blocks: its 3D U-Net.
      scale_limits: least and largest standard deviation of a Gaussian, in multiples of half the
        spacing of the map; None leaves them free.
      remat: makes what lies within blocks and layers again in the backward pass.
    """

    def __init__(
        self,
        resolution: int,
        *,
        grid: int,
        code_dim: int,
        dim: int,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        view_attention_every: int,
        up: Literal["nearest", "shuffle", "hybrid"] = "shuffle",
        up_channels: Sequence[int],
        up_depths: Sequence[int] = (),
        up_pictures: int | None = None,
        projection: Literal["attention", "token"] = "attention",
        offsets: bool = True,
        offset_dim: int,
        offset_layers: int,
        offset_heads: int,
        offset_attention: Literal["full", "axial_time"] = "full",
        offset_features: bool = False,
        offset_scaled: bool = False,
        unet_channels: Sequence[int],
        unet_blocks: int,
        scale_limits: Sequence[float] | None = None,
        remat: bool = False,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.static = StaticDecoder(
            resolution,
            grid,
            code_dim,
            dim,
            num_blocks,
            num_heads,
            hidden_dim,
            view_attention_every=view_attention_every,
            up=up,
            up_channels=up_channels,
            up_depths=up_depths,
            up_pictures=up_pictures,
            projection=projection,
            remat=remat,
            dtype=dtype,
            rngs=rngs,
        )
        map_size = grid * 2 ** len(up_channels)
        self.offsets = (
            OffsetPredictor(
                grid,
                map_size,
                dim,
                up_channels[-1] if offset_features else 0,
                dim=offset_dim,
                num_layers=offset_layers,
                num_heads=offset_heads,
                attention=offset_attention,
                scaled=offset_scaled,
                unet_channels=unet_channels,
                unet_blocks=unet_blocks,
                remat=remat,
                dtype=dtype,
                rngs=rngs,
            )
            if offsets
            else None
        )
        if scale_limits is not None:
            low, high = scale_limits
            if not 0 < low < 1 < high:
                raise ValueError(f"{scale_limits=} must be a number below 1 and one above")
        self.resolution = resolution
        self.scale_limits = None if scale_limits is None else tuple(scale_limits)
        self.grid = grid
        self.map_size = map_size

    def __call__(
        self,
        codes: Float[Array, "B T V n D"],
        cameras: Cameras,
        times: Float[Array, "B T"],
    ) -> Decoded:
        """Gaussians of every timestep. `times` are frame times in seconds times fps, from 0.

        The cameras are those of the V views, `[B, V, ...]`, constant over time. The result turns
        with the rig: the network sees it relative to view 0.
        """
        if codes.shape[-2] != self.grid**2:
            raise ValueError(f"{codes.shape[-2]} tokens a view; {self.grid=} needs {self.grid**2}")
        if cameras.viewmats.shape[1] != codes.shape[2]:
            raise ValueError(f"{cameras.viewmats.shape[1]} cameras for {codes.shape[2]} views")
        rig, back = canonical_frame(cameras)
        static = self.static(codes, rig)

        def gaussians(raw):
            found = activate(raw, rig, resolution=self.resolution, scale_limits=self.scale_limits)
            return geometry.transform_gaussians(found, back[:, None])

        coarse = gaussians(static.raw)
        if self.offsets is None:
            return Decoded(coarse, coarse)
        return Decoded(coarse, gaussians(static.raw + self.offsets(static, times)))
