"""Tile rasterizer in plain XLA, forward and backward, for any device.

Tiling: images are cut into square tiles; a step of the inner loop takes the next `chunk` Gaussians
of each of `group` tiles and works on the block [group, chunk, pixels], whatever the scene's size:
alphas, their running product over the chunk, and matrix products that sum colours (forward) or
gradients and their moments (backward). Tiles are grouped by the length of their lists, and a
group ends as soon as its lists or its pixels' transmittances are used up.

The backward pass keeps only the images. It runs front to back as well: with w the weights and q the
products of a Gaussian's channels with a pixel's cotangent, what lies behind Gaussian j adds up to
the pixel's total of w q minus its running sum. The gradient of sigma is reduced to the moments
1, x, y, x^2, xy, y^2 about the tile's centre by one matrix product, and those are shifted to
the Gaussian's mean. Only blending has a custom_vjp; the projection is left to autodiff.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fourdstar_jax.kernels.devices import vary_like
from fourdstar_jax.kernels.rasterize.projection import (
    ALPHA_MAX,
    ALPHA_MIN,
    TRANSMITTANCE_MIN,
    Projected,
)
from fourdstar_jax.kernels.rasterize.rows import Counts, blend_in_tiles
from fourdstar_jax.kernels.rasterize.tiles import Grid, geometry_gradient, tile_centres

TILE = 8  # pixels; small tiles waste fewer pairs, and the loops are over blocks of many tiles


class Blocks(NamedTuple):
    """Numbers of tiles and of Gaussians that one step of the inner loop takes."""

    group: int
    chunk: int


def default_blocks() -> Blocks:
    """Blocks of about a megabyte for CPU caches, of many times that for an accelerator."""
    if jax.default_backend() == "cpu":
        return Blocks(group=128, chunk=32)
    return Blocks(group=4096, chunk=32)


def blend(
    projected: Projected,
    channels: Float[Array, "I G C"],
    *,
    width: int,
    height: int,
    capacity: int,
) -> tuple[Float[Array, "I h w C+1"], Counts]:
    """Images of I cameras, each with its own projected Gaussians.

    The last channel is the transmittance that is left.
    """
    grid = Grid(TILE, width, height)
    return blend_in_tiles(
        lambda *lists: _blend_tiles(*lists, grid, default_blocks()),
        projected,
        channels,
        grid,
        capacity,
    )


class _Step(NamedTuple):
    """A block of the inner loop: Gaussians [group, chunk, ...] against pixels [group, ..., P]."""

    ids: jax.Array  # [group, chunk]; the number of Gaussians where the list has ended
    geometry: jax.Array  # [group, chunk, 6]
    channels: jax.Array  # [group, chunk, C]
    alphas: jax.Array  # [group, chunk, P], 0 where skipped
    sensitive: jax.Array  # [group, chunk, P], alphas, 0 where a clamp hides their gradient
    before: jax.Array  # [group, chunk, P], transmittance in front of each Gaussian
    after: jax.Array  # [group, chunk, P], and behind it
    weights: jax.Array  # [group, chunk, P]


def _pixel_offsets(grid: Grid, dtype):
    """Pixel centres (x, y) of a tile relative to its centre, [P] each."""
    index = jnp.arange(grid.tile * grid.tile)
    shift = 0.5 - grid.tile / 2
    x, y = index % grid.tile, index // grid.tile
    return x.astype(dtype) + shift, y.astype(dtype) + shift


def _running(combine, unit, x):
    """Running products or sums over axis 1 of x [group, chunk, P], each block in log2(chunk) steps.

    (`jnp.cumprod` takes four times as long on CPUs.)
    """
    shift = 1
    while shift < x.shape[1]:
        moved = jnp.pad(x, ((0, 0), (shift, 0), (0, 0)), constant_values=unit)[:, : x.shape[1]]
        x = combine(x, moved)
        shift *= 2
    return x


def _step(k, transmittance, geometry, channels, ids, start, end, centres, grid, blocks) -> _Step:
    """Evaluates chunk k of the lists [start, end) of a group of tiles."""
    num = geometry.shape[0]
    slot = start[:, None] + k * blocks.chunk + jnp.arange(blocks.chunk, dtype=jnp.int32)
    listed = ids[jnp.minimum(slot, ids.shape[0] - 1)]
    live = slot < end[:, None]
    rows = geometry[listed]
    x, y = _pixel_offsets(grid, geometry.dtype)
    dx = (rows[..., 0] - centres[0][:, None])[..., None] - x
    dy = (rows[..., 1] - centres[1][:, None])[..., None] - y
    a, b, c = (rows[..., i, None] for i in (2, 3, 4))
    opacity = jnp.where(live, rows[..., 5], 0.0)[..., None]
    sigma = 0.5 * ((a * dx + b * dy) ** 2 + (c * dy) ** 2)
    raw = opacity * jnp.exp(-sigma)
    visible = raw >= ALPHA_MIN
    alphas = jnp.where(visible, jnp.minimum(raw, ALPHA_MAX), 0.0)
    after = transmittance[:, None] * _running(jnp.multiply, 1.0, 1 - alphas)
    before = jnp.concatenate([transmittance[:, None], after[:, :-1]], axis=1)
    weights = jnp.where(after > TRANSMITTANCE_MIN, alphas * before, 0.0)
    sensitive = jnp.where(visible & (raw <= ALPHA_MAX), raw, 0.0)
    ids = jnp.where(live, listed, num)
    return _Step(ids, rows, channels[listed], alphas, sensitive, before, after, weights)


def _groups(offsets, grid: Grid, blocks: Blocks, dtype):
    """Tiles in groups of similar length, longest first: (tiles, starts, ends, centres)."""
    num_tiles = offsets.shape[0] - 1
    lengths = offsets[1:] - offsets[:-1]
    index = jnp.arange(num_tiles, dtype=jnp.int32)
    order = jax.lax.sort((-lengths, index), num_keys=1, is_stable=True)[1]
    group = min(blocks.group, num_tiles)
    padded = -(-num_tiles // group) * group
    order = jnp.concatenate([order, jnp.full(padded - num_tiles, num_tiles, jnp.int32)])
    tile = jnp.minimum(order, num_tiles - 1)
    start = offsets[tile]
    end = jnp.where(order < num_tiles, offsets[tile + 1], start)
    per_image = grid.rows * grid.columns
    centres = [x[tile % per_image] for x in tile_centres(grid, dtype)]
    return jax.tree.map(lambda x: x.reshape(-1, group), (order, start, end, centres))


def _pending(k, transmittance, start, end, blocks):
    """Tells whether any tile of the group has both Gaussians and transmittance left."""
    alive = jnp.any(transmittance > TRANSMITTANCE_MIN, axis=1)
    return jnp.any(alive & (start + k * blocks.chunk < end))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _blend_tiles(geometry, channels, ids, offsets, grid: Grid, blocks: Blocks):
    """Blends the lists of all tiles.

    Args are rows (u, v, a, b, c, opacity) and channel values of all images' Gaussians, the lists of
    `binning.Bins`, and sizes. Returns [tiles, C + 1, P], transmittance last.
    """
    dtype = geometry.dtype
    pixels = grid.tile * grid.tile
    num_channels = channels.shape[1]
    order, *lists = _groups(offsets, grid, blocks, dtype)

    def one_group(args):
        start, end, centres = args

        def body(carry):
            k, transmittance, total, left = carry
            step = _step(
                k, transmittance, geometry, channels, ids, start, end, centres, grid, blocks
            )
            total += jnp.einsum("tkp,tkc->tcp", step.weights, step.channels, precision="highest")
            # Transmittance falls with every Gaussian: the last one allowed is the smallest.
            allowed = jnp.where(step.after > TRANSMITTANCE_MIN, step.after, 1.0)
            left = jnp.minimum(left, jnp.min(allowed, axis=1))
            return k + 1, step.after[:, -1], total, left

        group = start.shape[0]
        ones = jnp.ones((group, pixels), dtype)
        total = jnp.zeros((group, num_channels, pixels), dtype)
        ones, total = vary_like((geometry, channels, offsets), ones, total)
        _, _, total, left = jax.lax.while_loop(
            lambda x: _pending(x[0], x[1], start, end, blocks),
            body,
            (jnp.int32(0), ones, total, ones),
        )
        return jnp.concatenate([total, left[:, None]], axis=1)

    blended = jax.lax.map(one_group, tuple(lists))  # [groups, group, C + 1, P]
    blended = blended.reshape(-1, num_channels + 1, pixels)
    empty = jnp.zeros((offsets.shape[0] - 1, num_channels + 1, pixels), dtype)
    return empty.at[order.reshape(-1)].set(blended, mode="drop", unique_indices=True)


def _blend_tiles_fwd(geometry, channels, ids, offsets, grid, blocks):
    out = _blend_tiles(geometry, channels, ids, offsets, grid, blocks)
    return out, (geometry, channels, ids, offsets, out)


def _blend_tiles_bwd(grid, blocks, residuals, cotangent):
    geometry, channels, ids, offsets, out = residuals
    dtype = geometry.dtype
    order, *lists = _groups(offsets, grid, blocks, dtype)
    last = offsets.shape[0] - 2
    # Transmittance is one minus the sum of the weights: a channel of ones with the opposite sign.
    cotangent, dleft = cotangent[:, :-1], cotangent[:, -1]
    total = jnp.sum(cotangent * out[:, :-1], axis=1) - dleft * (1 - out[:, -1])  # [tiles, P]
    x, y = _pixel_offsets(grid, dtype)
    monomials = jnp.stack([jnp.ones_like(x), x, y, x * x, x * y, y * y], axis=1)  # [P, 6]

    def one_group(dense, args):
        tile, start, end, centres = args
        tile = jnp.minimum(tile, last)
        weight_of = cotangent[tile]  # [group, C, P]
        total_of, dleft_of = total[tile], dleft[tile]  # [group, P]

        def body(carry):
            k, transmittance, blended, dense = carry
            step = _step(
                k, transmittance, geometry, channels, ids, start, end, centres, grid, blocks
            )
            q = jnp.einsum("tkc,tcp->tkp", step.channels, weight_of, precision="highest")
            q -= dleft_of[:, None]
            running = blended[:, None] + _running(jnp.add, 0.0, step.weights * q)
            behind = total_of[:, None] - running
            dalphas = step.before * q - behind / (1 - step.alphas)
            live = step.after > TRANSMITTANCE_MIN
            dsigma = jnp.where(live, -dalphas * step.sensitive, 0.0)
            moments = jnp.einsum("tkp,pm->tkm", dsigma, monomials, precision="highest")
            dchannels = jnp.einsum("tkp,tcp->tkc", step.weights, weight_of, precision="highest")
            rows = jnp.concatenate(
                [geometry_gradient(step.geometry, moments, centres), dchannels], axis=-1
            )
            dense = dense.at[step.ids].add(rows, mode="drop")
            return k + 1, step.after[:, -1], running[:, -1], dense

        ones, zeros = vary_like((dense,), jnp.ones_like(total_of), jnp.zeros_like(total_of))
        init = (jnp.int32(0), ones, zeros, dense)
        final = jax.lax.while_loop(lambda x: _pending(x[0], x[1], start, end, blocks), body, init)
        return final[3], None

    dense = jnp.zeros((geometry.shape[0], geometry.shape[1] + channels.shape[1]), dtype)
    (dense,) = vary_like((geometry, channels, offsets, cotangent), dense)
    dense, _ = jax.lax.scan(one_group, dense, (order, *lists))
    return dense[:, :6], dense[:, 6:], None, None


_blend_tiles.defvjp(_blend_tiles_fwd, _blend_tiles_bwd)
