"""Sizes, constants and arrays that the kernels for GPUs and their callers share."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.rasterize.pallas_gpu.lanes import LANES, WARP
from fourdstar_jax.kernels.rasterize.projection import ALPHA_MIN

TILE = 16  # pixels
QUAD = 8  # pixels
WARPS = LANES // WARP
GEOMETRY = 6  # numbers a row begins with: u, v, a, b, c (scaled for base 2), log2(opacity)
MOMENTS = 6  # 1, x, y, x^2, x y, y^2
PITCH = 36  # floats from one row of partial sums to the next: 16-byte reads without bank conflicts
FORWARD_UNROLL = 4  # Gaussians that are evaluated together
BACKWARD_UNROLL = 2
GATHER_UNROLL = 2
# The backward pass takes tiles in up to so many passes if all sums together exceed these bytes.
MOST_PASSES = 4
SUMS_BYTES = 2**26

LOG2E = math.log2(math.e)
# exp(-sigma) = exp2(-(a dx + b dy)^2 - (c dy)^2) with a, b, c times this.
SCALE = math.sqrt(0.5 * LOG2E)
# An ellipse's bound has a little to spare, so that rounding never drops what is visible.
REACH = -math.log2(ALPHA_MIN) + 1e-3
MARGIN = 2e-3  # pixels
NOTHING = -1e30  # log2 of the opacity of a Gaussian that is not there

F32, I32 = jnp.float32, jnp.int32


class Inputs(NamedTuple):
    """Projected Gaussians of I images, in sets of equally many that share colours and features."""

    u: Float[Array, "I G"]  # means2d, pixels
    v: Float[Array, "I G"]
    a: Float[Array, "I G"]  # conic_roots, 1 / pixels
    b: Float[Array, "I G"]
    c: Float[Array, "I G"]
    opacities: Float[Array, "I G"]  # 0 where culled
    depths: Float[Array, "I G"]
    colors: Float[Array, "S G 3"]
    features: Float[Array, "S G F"]  # F may be 0


class Blended(NamedTuple):
    """Images of I cameras, a plane for each channel."""

    channels: Float[Array, "C I h w"]  # colours, expected depth times alpha (if asked), features
    left: Float[Array, "I h w"]  # transmittance
    num_pairs: Int[Array, "*i"]  # (tile, Gaussian), of all images; within `call` of each image
    overflow: Bool[Array, ""]


class Spec(NamedTuple):
    """Sizes and options of one call."""

    images: int
    gaussians: int  # of each image
    sets: int
    features: int
    with_depths: bool
    width: int  # pixels
    height: int
    capacity: int
    interpret: bool

    @property
    def columns(self):
        return -(-self.width // TILE)

    @property
    def rows(self):
        return -(-self.height // TILE)

    @property
    def tiles(self):
        return self.images * self.rows * self.columns

    @property
    def total(self):
        """The number of Gaussians of all images."""
        return self.images * self.gaussians

    @property
    def channels(self):
        return 3 + self.with_depths + self.features

    @property
    def words(self):
        """Numbers in a row, a multiple of four: geometry, then channels."""
        return -(-(GEOMETRY + self.channels) // 4) * 4

    @property
    def sums(self):
        """Numbers that the backward pass keeps of a (tile, Gaussian) pair."""
        return MOMENTS + self.channels

    @property
    def slots(self):
        """Gaussians whose partial sums a warp reduces together, a row of lanes for each number."""
        return WARP // (3 + self.channels)

    @property
    def passes(self):
        """Passes over the tiles that the backward pass takes."""
        return min(MOST_PASSES, -(-self.capacity * self.sums * 4 // SUMS_BYTES))

    @property
    def window(self):
        """Places for sums in one pass; the last tile of a pass may go beyond."""
        return -(-self.capacity // self.passes)


def shape_of(*shape, dtype=F32):
    """Shape and type of an array, float32 unless told otherwise."""
    return jax.ShapeDtypeStruct(shape, dtype)
