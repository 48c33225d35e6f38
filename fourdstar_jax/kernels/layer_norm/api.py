"""`add_layer_norm`: what stands between the matrix products of a pre-norm transformer block.

A projection's bias, the residual sum, a LayerNorm, in UniTok a second one right behind it: that
only moves memory. `reference.py` defines it in a few lines of jnp, which run everywhere. On a GPU
of Hopper or newer, for bfloat16, a kernel reads every row once and writes every result once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fourdstar_jax.kernels.devices import why_no_mosaic_gpu
from fourdstar_jax.kernels.layer_norm import kernel, reference
from fourdstar_jax.kernels.layer_norm.reference import Norm


def add_layer_norm(
    x: Float[Array, "*b D"],
    y: Float[Array, "*b D"] | None,
    norms: Sequence[Norm],
    *,
    bias: Float[Array, " D"] | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "*b D"], Float[Array, "*b D"]]:
    """`s = x + (y + bias)`, and the LayerNorms of s, one after the other: (s, normalised).

    Without `y` the sum is `x` itself. The norms are of type `dtype` (x's if not given): their input
    and results are rounded to it, as are their scales and biases; statistics are float32. Sums are
    rounded as jnp rounds them, `bias` to y's type first.

    The kernel runs where `fits` says so: its results differ from the plain form's by their float32
    rounding, and its gradient is the plain form's. The compiler cannot split it over devices, so
    with more than one device in the current mesh, or visible where there is no mesh, the plain form
    runs; likewise under `jax.vmap`.
    """
    norms = tuple(norms)
    if not 1 <= len(norms) <= 2:
        raise ValueError(f"{len(norms)=} must be 1 or 2")
    if y is None and bias is not None:
        raise ValueError("there is a bias of y, but y is None")
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if not fits(x, y, dtype):
        return reference.add_layer_norm(x, y, norms, bias, dtype)
    epsilons = tuple(norm.epsilon for norm in norms)
    pairs = tuple((norm.scale, norm.bias) for norm in norms)
    results: Any = kernel.fused(epsilons, False, x, y, bias, pairs)
    return results


def fits(x: Array, y: Array | None, dtype: jnp.dtype) -> bool:
    """Tells whether the kernel takes these arrays here and now: bfloat16, but x may be float32."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
        return False
    types = x.dtype in (jnp.bfloat16, jnp.float32) and (y is None or y.dtype == jnp.bfloat16)
    mesh = jax.sharding.get_abstract_mesh()
    devices = jax.device_count() if mesh.empty else mesh.size
    return types and devices == 1 and kernel.takes(x.shape) and why_no_mosaic_gpu() is None
