"""Differentiable rasterization of 3D Gaussians."""

from fourdstar_jax.kernels.rasterize.api import IMPLEMENTATIONS, rasterize
from fourdstar_jax.kernels.rasterize.binning import pick_capacity
from fourdstar_jax.kernels.rasterize.projection import usable_mask

__all__ = ["IMPLEMENTATIONS", "pick_capacity", "rasterize", "usable_mask"]
