"""Shared steps of implementations that take a row of channels for each projected Gaussian."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.rasterize import binning
from fourdstar_jax.kernels.rasterize.implementation import Images
from fourdstar_jax.kernels.rasterize.projection import Projected, project
from fourdstar_jax.kernels.rasterize.tiles import Grid, untile


class Counts(NamedTuple):
    """The number of (Gaussian, tile) pairs, and whether that was too many."""

    num_pairs: Int[Array, ""]
    overflow: Bool[Array, ""]


def from_rows(blend: Callable[..., tuple[Array, Counts]]) -> Callable[..., Images]:
    """An `Implementation.blend` from one that takes `Projected` and an array of channels.

    `blend(projected, channels, *, width, height, capacity)` takes I images of G Gaussians each,
    channels `[I, G, C]`, and returns images `[I, h, w, C + 1]`, transmittance last, and `Counts`.
    It takes `interpret` if it has kernels.
    """

    def blend_scene(
        gaussians, cameras, features, usable, *, with_depths, capacity, interpret, **options
    ) -> Images:
        projected = project(gaussians, cameras, usable, **options)
        shape = projected.depths.shape  # [..., V, G]
        # Alpha is a channel of ones: one minus the transmittance has few digits where alpha is
        # small, and one minus alpha has few where the transmittance, the background's share, is.
        depths = projected.depths[..., None]
        channels = [gaussians.colors[..., None, :, :], jnp.ones_like(depths)]
        channels += [depths] if with_depths else []
        channels += [features[..., None, :, :]] if features is not None else []
        channels = [jnp.broadcast_to(x, (*shape, x.shape[-1])) for x in channels]
        channels = jnp.concatenate(channels, axis=-1)  # [..., V, G, C]
        axes = len(shape) - 1
        projected = jax.tree.map(lambda x: x.reshape(-1, *x.shape[axes:]), projected)
        channels = channels.reshape(-1, *channels.shape[axes:])

        run = functools.partial(blend, interpret=interpret) if interpret else blend
        size = dict(width=options["width"], height=options["height"])
        blended, counts = run(projected, channels, **size, capacity=capacity)
        blended = blended.reshape(*shape[:-1], *blended.shape[1:])  # [..., V, h, w, C + 1]
        split = 4 + with_depths
        return Images(
            colors=blended[..., :3],
            alphas=blended[..., 3:4],
            depths=blended[..., 4:5] if with_depths else None,
            features=None if features is None else blended[..., split:-1],
            left=blended[..., -1:],
            num_pairs=counts.num_pairs,
            overflow=counts.overflow,
        )

    return blend_scene


def blend_in_tiles(
    blend_tiles: Callable[..., Float[Array, "tiles C+1 P"]],
    projected: Projected,
    channels: Float[Array, "I G C"],
    grid: Grid,
    capacity: int,
) -> tuple[Float[Array, "I h w C+1"], Counts]:
    """Bins the Gaussians, blends every tile's list and puts the images together from tiles.

    `blend_tiles(geometry, channels, ids, offsets)` takes rows (u, v, a, b, c, opacity) and channels
    of all images' Gaussians, and the lists of `binning.Bins`; transmittance comes last.
    """
    images, num, num_channels = channels.shape
    bins = binning.bin_gaussians(projected, grid, capacity)
    geometry = jnp.concatenate(
        [projected.means2d, projected.conic_roots, projected.opacities[..., None]], axis=-1
    )
    tiles = blend_tiles(
        geometry.reshape(images * num, 6),
        channels.reshape(images * num, num_channels),
        bins.ids,
        bins.offsets,
    )
    return untile(tiles, grid), Counts(bins.num_pairs, bins.overflow)
