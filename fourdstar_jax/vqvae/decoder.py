"""The static half of the spatial-temporal decoder: codes of a timestep to Gaussians on its rays.

Paper section 3.1. Axes: B objects, T timesteps, V views, n tokens a view, m x m Gaussians a view.
Timesteps never meet here; the views of one timestep meet in the view attention. A network trained
from scratch cannot know where the world's +x is, so positions and rotations are predicted in the
axes of the view's camera and turned into the world by the camera that is given.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax import geometry, sharding
from fourdstar_jax.nn import Common, Dtype, linear
from fourdstar_jax.nn.conv import conv
from fourdstar_jax.nn.embedding import patch_rays
from fourdstar_jax.nn.vit import BLOCK_EPS, AttnProjection, Block, SelfAttention, TokenProjection
from fourdstar_jax.nn.vitamin import up_path
from fourdstar_jax.types import Cameras, Gaussians

# Channels of a Gaussian map, in L4GM's order (core/models.py).
XYZ, OPACITY, SCALE, ROTATION, RGB = (
    slice(0, 3),
    3,
    slice(4, 7),
    slice(7, 11),
    slice(11, 14),
)
NUM_CHANNELS = 14
MAX_XYZ = 1.0
SCALE_UNIT = 0.1
XYZ_UNIT = 0.1  # of the position residual: at 1, an optimizer's step throws centres across pixels


class StaticMaps(NamedTuple):
    """What the offset predictor reads."""

    raw: Float[Array, "B T V m m 14"]  # Gaussians before the activations, camera axes
    features: Float[Array, "B T V m m C"]  # what `raw` is a convolution of
    tokens: Float[Array, "B T V n D"]  # continuous tokens, before the blocks


def activate(
    raw: Float[Array, "B T V m m 14"],
    cameras: Cameras,
    *,
    resolution: int,
    scale_limits: Sequence[float] | None = None,
) -> Gaussians:
    """Gaussians `[B, T, G, ...]`, view-major, in the cameras' world frame.

    `cameras.Ks` belong to images of `resolution` squared. At `raw` zero a Gaussian lies on its
    pixel's ray, in the plane of the origin's depth, with half the pixel spacing there as standard
    deviation: as dense as it takes to cover the plane, at any map size, radius or field of view.
    Channels and activations follow L4GM; its free positions are clamped to [-1, 1]. `scale_limits`
    bound the standard deviations, in multiples of that start; None leaves them free, and grows
    needles.
    """
    raw = raw.astype(jnp.float32)
    b, t, v, m = raw.shape[:4]
    viewmats = cameras.viewmats
    Ks = geometry.rescale_intrinsics(cameras.Ks, m / resolution)[:, :, None, None]  # [B,V,1,1,3,3]
    c2w = geometry.invert_rigid(viewmats)
    depth = viewmats[:, :, None, None, 2, 3]  # camera z of the origin

    pixel = jnp.arange(m, dtype=jnp.float32) + 0.5
    x = (pixel - Ks[..., 0, 2]) / Ks[..., 0, 0]  # [B, V, 1, m]
    y = (pixel[:, None] - Ks[..., 1, 2]) / Ks[..., 1, 1]  # [B, V, m, 1]
    x, y = jnp.broadcast_arrays(x, y)
    start = jnp.stack([x, y, jnp.ones_like(x)], axis=-1) * depth[..., None]  # [B, V, m, m, 3]
    means = jnp.einsum(
        "bvij,btvhwj->btvhwi", c2w[..., :3, :3], start[:, None] + XYZ_UNIT * raw[..., XYZ]
    )
    means = means + c2w[:, None, :, None, None, :3, 3]
    means = jnp.clip(means, -MAX_XYZ, MAX_XYZ)

    sigma = jnp.maximum(0.5 * depth / Ks[..., 0, 0], 1e-4)[:, None, ..., None]  # [B, 1, V, 1, 1, 1]
    if scale_limits is None:
        bias = sigma / SCALE_UNIT
        bias = bias + jnp.log(-jnp.expm1(-bias))  # softplus inverted
        scales = SCALE_UNIT * nnx.softplus(raw[..., SCALE] + bias)
    else:
        scales = sigma * jnp.exp(_between(raw[..., SCALE], *map(math.log, scale_limits)))

    turn = geometry.rotmat_to_quat(c2w[..., :3, :3])[:, None, :, None, None]
    local = geometry.normalize(raw[..., ROTATION])
    quats = geometry.quat_multiply(jnp.broadcast_to(turn, local.shape), local)

    def flat(a):
        return a.reshape(b, t, v * m * m, *a.shape[5:])

    return Gaussians(
        means=flat(means),
        quats=flat(quats),
        scales=flat(scales),
        opacities=flat(nnx.sigmoid(raw[..., OPACITY])),
        colors=flat(0.5 * jnp.tanh(raw[..., RGB]) + 0.5),
    )


def _between(x: Float[Array, "*b"], low: float, high: float) -> Float[Array, "*b"]:
    """x near zero, and between `low` < 0 and `high` > 0 everywhere."""
    limit = jnp.where(x < 0, -low, high)
    return limit * jnp.tanh(x / limit)


class ViewAttention(nnx.Module):
    """Attention over the tokens of all views of one timestep, behind a gate per channel.

    Gates start at 1; at 0 the layer is the identity, which keeps loaded weights as they were.
    """

    def __init__(
        self, dim: int, num_heads: int, *, gate_init: float, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.gate = nnx.Param(jnp.full(dim, gate_init, jnp.float32))

    def __call__(self, x: Float[Array, "b V n D"]) -> Float[Array, "b V n D"]:
        y = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [b, V n, D]
        return x + (self.gate[...].astype(x.dtype) * self.attn(y)).reshape(x.shape)


class StaticDecoder(nnx.Module):
    """Codes to Gaussian maps: projection, rays, blocks with view attention, up-convolutions, head.

    `grid` tokens a side; the map is `grid * 2 ** len(up_channels)` wide. A view attention follows
    every `view_attention_every` blocks. The continuous tokens get the Plücker coordinates of their
    patch of rays through a patch convolution, which is the only place they learn where they are.
    """

    def __init__(
        self,
        resolution: int,
        grid: int,
        code_dim: int,
        dim: int,
        num_blocks: int,
        num_heads: int,
        hidden_dim: int,
        *,
        view_attention_every: int,
        view_gate_init: float = 1.0,
        up: Literal["nearest", "shuffle", "hybrid"] = "shuffle",
        up_channels: Sequence[int],
        up_depths: Sequence[int] = (),
        projection: Literal["attention", "token"] = "attention",
        remat: bool = False,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if resolution % grid:
            raise ValueError(f"{resolution=} must be a multiple of {grid=}")
        kw = Common(dtype=dtype, rngs=rngs)
        project = {"attention": AttnProjection, "token": TokenProjection}[projection]
        self.post_quant_proj = project(code_dim, dim, rngs=rngs)  # float32, as in UniTok
        patch = resolution // grid
        small = nnx.initializers.normal(0.02)
        self.rays = linear(6 * patch * patch, dim, (None, "embed"), init=small, **kw)
        self.blocks = nnx.List([Block(dim, num_heads, hidden_dim, **kw) for _ in range(num_blocks)])
        self.view_attentions = nnx.List(
            [
                ViewAttention(dim, num_heads, gate_init=view_gate_init, **kw)
                for _ in range(num_blocks // view_attention_every)
            ]
        )
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, **kw)
        self.up = up_path(up, dim, up_channels, up_depths, **kw)
        width = up_channels[-1]
        self.head_norm = nnx.GroupNorm(width, num_groups=math.gcd(8, width), **kw)
        bias = [0.0] * NUM_CHANNELS
        bias[OPACITY] = -2.0  # four views of covering Gaussians are then half transparent
        bias[ROTATION.start] = 1.0
        # A tenth of the usual size: colours, shapes and places start almost alike.
        head_init = nnx.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        self.head = conv(width, NUM_CHANNELS, 3, axis=None, init=head_init, bias=bias, rngs=rngs)
        self.resolution = resolution
        self.view_attention_every = view_attention_every
        self.remat = remat

    def __call__(self, codes: Float[Array, "B T V n D"], cameras: Cameras) -> StaticMaps:
        b, t, v, n, _ = codes.shape
        grid = math.isqrt(n)
        tokens = self.post_quant_proj(codes.reshape(b * t * v, n, -1))
        tokens = sharding.constrain(tokens, "batch", None, None)

        rays = patch_rays(cameras, resolution=self.resolution, grid=grid)
        rays = rays.reshape(b, 1, v, n, -1)
        x = tokens.reshape(b, t, v, n, -1) + self.rays(rays)  # [B, T, V, n, D]

        def run(layer, x):
            call = jax.checkpoint(lambda m, x: m(x)) if self.remat else lambda m, x: m(x)
            return call(layer, x)

        x = x.reshape(b * t * v, n, -1)
        for i, block in enumerate(self.blocks):
            x = sharding.constrain(run(block, x), "batch", None, None)
            if (i + 1) % self.view_attention_every == 0:
                layer = self.view_attentions[i // self.view_attention_every]
                x = run(layer, x.reshape(b * t, v, n, -1)).reshape(x.shape)

        x = self.up(self.norm(x).reshape(b * t * v, grid, grid, -1))
        features = nnx.silu(self.head_norm(x))
        raw = self.head(features.astype(jnp.float32))

        def unfold(a):
            return a.reshape(b, t, v, *a.shape[1:])

        return StaticMaps(unfold(raw), unfold(features), unfold(tokens))
