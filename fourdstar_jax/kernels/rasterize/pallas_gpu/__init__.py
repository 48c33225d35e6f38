"""Tile rasterizer for GPUs (Hopper or newer): Pallas kernels on Mosaic GPU, forward and backward.

Tiling: an image is cut into tiles of 16x16 pixels, and a block of 128 lanes owns a tile. Each of
its four warps owns a quad of 8x8 pixels, two a lane, and walks the tile's list on its own: it takes
32 Gaussians at a time, one a lane, keeps those whose ellipse of alpha >= 1/255 reaches its quad,
lays their rows out in shared memory, and blends them one after the other until its pixels are used
up.

    pack      lane = Gaussian of an image: its row of numbers, and exactly how many tiles it touches
    (sort)    Gaussians of all images by depth; a stable sort keeps the lower index in front
    expand    lane = pair: its tile and its owner, in order of the owners' depths
    (sort)    pairs by tile, stable again, so that each tile's list is in exact order of depth
    forward   warp = quad: channels and transmittance of its pixels, and how far in its list it went
    backward  block = tile, 32 Gaussians at a time: each warp sums the moments of what its pixels
              send back, five Gaussians at once through shared memory; one warp adds up the four
    gather    lane = Gaussian of an image: adds up its tiles' sums in fixed order, and turns moments
              into gradients

Nothing is added atomically: the same inputs give the same bits. What the backward pass keeps of a
(tile, Gaussian) pair lies where the tile's list says, so only pairs that the forward pass reached
take memory; if the sums of all pairs would take much, the tiles are taken in several passes.

One custom_vjp holds all kernels; the projection before it is left to autodiff. The kernel bodies
are plain Pallas on arrays of (128,) with the lane operations of lanes.py, which have their meaning
in plain JAX there as well: with `interpret=True` the same bodies run on any device, slowly.
"""

from fourdstar_jax.kernels.rasterize.pallas_gpu.call import blend, why_not
from fourdstar_jax.kernels.rasterize.pallas_gpu.scene import blend_scene
from fourdstar_jax.kernels.rasterize.pallas_gpu.spec import TILE, Inputs

__all__ = ["TILE", "Inputs", "blend", "blend_scene", "why_not"]
