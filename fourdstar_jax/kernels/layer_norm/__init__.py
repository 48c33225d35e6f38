"""Sum, bias and LayerNorms of rows in one pass over memory."""

from fourdstar_jax.kernels.layer_norm.api import Norm, add_layer_norm

__all__ = ["Norm", "add_layer_norm"]
