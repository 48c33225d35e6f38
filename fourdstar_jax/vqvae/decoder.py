"""The static half of the spatial-temporal decoder: codes of a timestep to Gaussians on its rays.

Paper section 3.1. Axes: B objects, T timesteps, V views, n tokens a view, m x m Gaussians a view.
Timesteps never meet here; the views of one timestep meet in the view attention. A network trained
from scratch cannot know where the world's +x is, so positions and rotations are predicted in the
axes of the view's camera and turned into the world by the camera that is given.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax import geometry, sharding
from fourdstar_jax.nn import Common, Dtype, linear, recomputed, stack_layers
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

    Gates start at 1; at 0, where `vqvae.warm_start` sets them, the layer is the identity.
    """

    def __init__(self, dim: int, num_heads: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(dim, epsilon=BLOCK_EPS, dtype=dtype, rngs=rngs)
        self.attn = SelfAttention(dim, num_heads, dtype=dtype, rngs=rngs)
        self.gate = nnx.Param(jnp.ones(dim, jnp.float32))

    def __call__(self, x: Float[Array, "b V n D"]) -> Float[Array, "b V n D"]:
        y = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [b, V n, D]
        return x + (self.gate[...].astype(x.dtype) * self.attn(y)).reshape(x.shape)


def in_parts(function: Callable[..., Any], size: int | None, *arrays: Any) -> Any:
    """`function` of arrays `[B N', ...]` on parts of the second axis of `arrays` `[B, N, ...]`.

    One part after the other; it has the largest N' up to `size` that divides N. The results
    `[B N', ...]` come back as `[B, N, ...]`. What `function` keeps for its gradient is made again,
    so that it exists for one part at a time. With `size` None all is one part, and is kept.
    """
    b, n = jax.tree.leaves(arrays)[0].shape[:2]

    def fold(arrays):
        arrays = jax.tree.map(
            lambda x: sharding.constrain(
                x.reshape(-1, *x.shape[2:]), "batch", *(None,) * (x.ndim - 2)
            ),
            arrays,
        )
        return function(*arrays)

    if size is None:
        return jax.tree.map(lambda y: y.reshape(b, n, *y.shape[1:]), fold(arrays))
    size = max(part for part in range(1, size + 1) if n % part == 0)
    parts = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(b, n // size, size, *x.shape[2:]), 1, 0), arrays
    )
    results = jax.lax.map(recomputed(fold, True, in_scan=True), parts)  # [parts, B N', ...]

    def join(y):
        y = jnp.moveaxis(y.reshape(n // size, b, size, *y.shape[2:]), 0, 1)
        return y.reshape(b, n, *y.shape[3:])

    return jax.tree.map(join, results)


class StaticDecoder(nnx.Module):
    """Codes to Gaussian maps: projection, rays, blocks with view attention, up-convolutions, head.

    `grid` tokens a side; the map is `grid * 2 ** len(up_channels)` wide. A view attention follows
    every `view_attention_every` blocks. The continuous tokens get the Plücker coordinates of their
    patch of rays through a patch convolution, which is the only place they learn where they are.
    Blocks and view attentions are stacked and scanned over: a program of one period compiles.
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
        up: Literal["nearest", "shuffle", "hybrid"] = "shuffle",
        up_channels: Sequence[int],
        up_depths: Sequence[int] = (),
        up_pictures: int | None = None,
        projection: Literal["attention", "token"] = "attention",
        remat: bool = False,
        dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if resolution % grid:
            raise ValueError(f"{resolution=} must be a multiple of {grid=}")
        if up_pictures is not None and up_pictures < 1:
            raise ValueError(f"{up_pictures=} must be positive, or None for all")
        kw = Common(dtype=dtype, rngs=rngs)
        project = {"attention": AttnProjection, "token": TokenProjection}[projection]
        self.post_quant_proj = project(code_dim, dim, rngs=rngs)  # float32, as in UniTok
        patch = resolution // grid
        small = nnx.initializers.normal(0.02)
        self.rays = linear(6 * patch * patch, dim, (None, "embed"), init=small, **kw)

        def block(rngs):
            return Block(dim, num_heads, hidden_dim, dtype=dtype, rngs=rngs)

        def view_attention(rngs):
            return ViewAttention(dim, num_heads, dtype=dtype, rngs=rngs)

        self.blocks = stack_layers(block, num_blocks, rngs)
        number = num_blocks // view_attention_every
        self.view_attentions = stack_layers(view_attention, number, rngs) if number else None
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
        self.num_blocks, self.view_attention_every = num_blocks, view_attention_every
        self.up_pictures = up_pictures
        self.remat = remat

    def __call__(self, codes: Float[Array, "B T V n D"], cameras: Cameras) -> StaticMaps:
        b, t, v, n, _ = codes.shape
        project = recomputed(lambda layer, x: layer(x), self.remat)
        tokens = project(self.post_quant_proj, codes.reshape(b * t * v, n, -1))
        tokens = sharding.constrain(tokens, "batch", None, None)

        rays = patch_rays(cameras, resolution=self.resolution, grid=math.isqrt(n))
        rays = rays.reshape(b, 1, v, n, -1)
        tokens = tokens.reshape(b, t, v, n, -1)
        x = tokens + self.rays(rays)  # [B, T, V, n, D]
        x = self._blocks(x.reshape(b * t * v, n, -1), v)
        raw, features = in_parts(self._maps, self.up_pictures, x.reshape(b, t * v, n, -1))

        def unfold(a):
            return a.reshape(b, t, v, *a.shape[2:])

        return StaticMaps(unfold(raw), unfold(features), tokens)

    def _blocks(self, x: Float[Array, "b n D"], num_views: int) -> Float[Array, "b n D"]:
        """All blocks, with the view attentions between them."""

        def block(x, layer):
            return sharding.constrain(layer(x), "batch", None, None), None

        def meet(layer, x):
            return layer(x.reshape(-1, num_views, *x.shape[1:])).reshape(x.shape)

        block = recomputed(block, self.remat, in_scan=True)
        meet = recomputed(meet, self.remat, in_scan=True)

        def period(x, layers):
            x, _ = jax.lax.scan(block, x, layers[0])
            return meet(layers[1], x), None

        every = self.view_attention_every
        whole = self.num_blocks // every * every
        if whole:
            first = jax.tree.map(lambda w: w[:whole].reshape(-1, every, *w.shape[1:]), self.blocks)
            x, _ = jax.lax.scan(period, x, (first, self.view_attentions))
        if whole < self.num_blocks:
            x, _ = jax.lax.scan(block, x, jax.tree.map(lambda w: w[whole:], self.blocks))
        return x

    def _maps(
        self, x: Float[Array, "b n D"]
    ) -> tuple[Float[Array, "b m m 14"], Float[Array, "b m m C"]]:
        """Raw Gaussians of each picture, and the features that they are a convolution of."""
        grid = math.isqrt(x.shape[1])
        x = self.up(self.norm(x).reshape(x.shape[0], grid, grid, -1))
        features = nnx.silu(self.head_norm(x))
        return self.head(features.astype(jnp.float32)), features
