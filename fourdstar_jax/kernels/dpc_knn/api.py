"""`cluster_dpc_knn`: density-peaks clustering of all tokens of a sample at once."""

import functools
import math
import typing
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.kernels.arguments import as_array, whole_number, widest_float
from fourdstar_jax.kernels.dpc_knn import reference
from fourdstar_jax.kernels.dpc_knn.reference import Clusters


@typing.no_type_check  # arguments are checked below, in the tests as elsewhere
def cluster_dpc_knn(
    x: Any,
    *,
    num_clusters: SupportsIndex,
    k: SupportsIndex,
    num_groups: SupportsIndex = 1,
    ids: Any = None,
    mask: Any = None,
) -> Clusters:
    """Density-peaks clustering of tokens by their k nearest neighbours; carries no gradient.

    With D_ij = |x_i - x_j| / sqrt(D): rho_i = exp(-mean of D_ij^2 over the k nearest tokens of the
    same group, itself included), delta_i = min D_ij over all denser tokens j (the largest distance
    of the sample for the densest), and the `num_clusters` tokens with the largest rho * delta are
    centres. Every token joins its nearest centre. The axis L holds `num_groups` groups of equal
    size, one after the other.

    `ids` are the token ids that x was made from: rows with equal ids are at a distance of exactly
    0. Without them only a token's distance to itself is exact. Tokens whose `mask` is False, or
    that hold a NaN or an infinity, are nobody's neighbour and in no cluster (-1). If fewer tokens
    differ than there are clusters, the surplus centres are not `valid`. Equal densities and equal
    scores go to the smaller index.

    x is centred first, so an offset that all tokens share changes nothing but the rounding that it
    came with. Where rho would underflow to 0 for most tokens of a sample, or squares leave the
    range of the type, distances count in units of the sample's extent. Computes in float64 where x
    is that (and JAX has it enabled), else in float32. `streaming` does the same group by group, on
    features as they are.

    Args:
      x: features `[..., L, D]`, floats; lists are taken, too, here and below.
      ids: `[..., L, K]`, integers.
      mask: `[..., L]`, bools.

    Raises ValueError, which names the argument, for wrong shapes, types and sizes.
    """
    x = as_array("x", x, "floats")
    if x.ndim < 2 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., L, D] with D of 1 or more, not {x.shape}")
    *batch, num_tokens, dim = x.shape
    num_groups = whole_number("num_groups", num_groups, 1)
    if num_tokens % num_groups:
        raise ValueError(f"{num_groups=} must divide the {num_tokens} tokens of x")
    num_clusters = whole_number("num_clusters", num_clusters, 1)
    if num_clusters > num_tokens:
        raise ValueError(f"{num_clusters=} must lie between 1 and the {num_tokens} tokens of x")
    k = whole_number("k", k, 1)
    if k > num_tokens // num_groups:
        raise ValueError(f"{k=} must lie between 1 and the {num_tokens // num_groups} of a group")
    if ids is None:
        ids = np.broadcast_to(np.arange(num_tokens)[:, None], (*batch, num_tokens, 1))
    ids = as_array("ids", ids, "integers")
    if ids.ndim != x.ndim or ids.shape[:-1] != x.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"ids must be {(*x.shape[:-1], 'K')}, a row for each of x, not {ids.shape}"
        )
    mask = as_array("mask", True if mask is None else mask, "bools")
    if mask.shape not in ((), x.shape[:-1]):
        raise ValueError(f"mask must be {x.shape[:-1]}, one for each row of x, not {mask.shape}")
    mask = jnp.broadcast_to(mask, x.shape[:-1])
    size = math.prod(batch)
    flat = _cluster(
        jax.lax.stop_gradient(jnp.asarray(x, widest_float(x))).reshape(size, num_tokens, dim),
        jnp.asarray(ids).reshape(size, num_tokens, ids.shape[-1]),
        mask.reshape(size, num_tokens),
        num_clusters=num_clusters,
        k=k,
        num_groups=num_groups,
    )
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), flat)


@functools.partial(jax.jit, static_argnames=("num_clusters", "k", "num_groups"))
def _cluster(x, ids, mask, **sizes) -> Clusters:
    return jax.vmap(functools.partial(reference.cluster, **sizes))(x, ids, mask)
