"""Square tiles over images: where they lie, images from them, and gradients from their moments."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Grid(NamedTuple):
    """Square tiles over images of one size."""

    tile: int  # pixels
    width: int  # pixels
    height: int  # pixels

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile)

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile)


def tile_centres(grid: Grid, dtype) -> tuple[Float[Array, " tiles"], Float[Array, " tiles"]]:
    """Centres (x, y) of one image's tiles in pixels, row-major."""
    index = jnp.arange(grid.columns * grid.rows)
    half = grid.tile / 2
    x, y = (index % grid.columns * grid.tile, index // grid.columns * grid.tile)
    return x.astype(dtype) + half, y.astype(dtype) + half


def untile(tiles: Float[Array, "N C P"], grid: Grid) -> Float[Array, "I h w C"]:
    """Images from their tiles, whose pixels are row-major; what goes beyond an image is cut off."""
    shape = (-1, grid.rows, grid.columns, tiles.shape[1], grid.tile, grid.tile)
    x = jnp.transpose(tiles.reshape(shape), (0, 1, 4, 2, 5, 3))
    x = x.reshape(x.shape[0], grid.rows * grid.tile, grid.columns * grid.tile, tiles.shape[1])
    return x[:, : grid.height, : grid.width]


def geometry_gradient(rows, moments, centres):
    """Gradients of (u, v, a, b, c, opacity) from moments [..., 6] of dsigma about tile centres."""
    u, v, a, b, c, opacity = (rows[..., i] for i in range(6))
    m, mx, my, mxx, mxy, myy = (moments[..., i] for i in range(6))
    x, y = u - centres[0][:, None], v - centres[1][:, None]
    sx, sy = x * m - mx, y * m - my  # sums of dsigma times (dx, dy)
    sxx = x * (sx - mx) + mxx
    sxy = x * sy - y * mx + mxy
    syy = y * (sy - my) + myy
    p, q = a * sx + b * sy, c * c * sy  # dsigma times (a dx + b dy), c^2 dy
    du, dv = a * p, b * p + q
    da, db, dc = a * sxx + b * sxy, a * sxy + b * syy, c * syy
    used = opacity > 0
    dopacity = jnp.where(used, -m / jnp.where(used, opacity, 1.0), 0.0)
    return jnp.stack([du, dv, da, db, dc, dopacity], axis=-1)
