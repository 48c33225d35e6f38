"""`cluster_dpc_knn`: density-peaks clustering of all tokens of a sample at once."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fourdstar_jax.kernels.dpc_knn import reference
from fourdstar_jax.kernels.dpc_knn.reference import Clusters


def cluster_dpc_knn(
    x: Float[Array, "*b L D"],
    *,
    num_clusters: int,
    k: int,
    num_groups: int = 1,
    ids: Int[Array, "*b L K"] | None = None,
    mask: Bool[Array, "*b L"] | None = None,
) -> Clusters:
    """Density-peaks clustering of tokens by their k nearest neighbours; carries no gradient.

    With D_ij = |x_i - x_j| / sqrt(D): rho_i = exp(-mean of D_ij^2 over the k nearest tokens of the
    same group, itself included), delta_i = min D_ij over all denser tokens j (the largest distance
    of the sample for the densest), and the `num_clusters` tokens with the largest rho * delta are
    centres. Every token joins its nearest centre. The axis L holds `num_groups` groups of equal
    size, one after the other.

    `ids` are the token ids that x was made from: rows with equal ids are at a distance of exactly
    0. Without them only a token's distance to itself is exact. Tokens whose `mask` is False are
    nobody's neighbour and in no cluster (-1). If fewer tokens differ than there are clusters, the
    surplus centres are not `valid`. Equal densities and equal scores go to the smaller index.

    `streaming` computes the same, group by group. Raises ValueError for sizes that do not fit.
    """
    *batch, num_tokens, dim = x.shape
    if num_groups < 1 or num_tokens % num_groups:
        raise ValueError(f"{num_groups=} must divide the {num_tokens} tokens")
    if not 1 <= num_clusters <= num_tokens:
        raise ValueError(f"{num_clusters=} must lie between 1 and the {num_tokens} tokens")
    if not 1 <= k <= num_tokens // num_groups:
        raise ValueError(f"{k=} must lie between 1 and the {num_tokens // num_groups} of a group")
    if ids is None:
        ids = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], (*batch, num_tokens, 1))
    if mask is None:
        mask = jnp.ones((*batch, num_tokens), bool)
    size = math.prod(batch)
    flat = jax.vmap(
        lambda x, ids, mask: reference.cluster(
            x, ids, mask, num_clusters=num_clusters, k=k, num_groups=num_groups
        )
    )(
        jax.lax.stop_gradient(x).reshape(size, num_tokens, dim),
        ids.reshape(size, num_tokens, ids.shape[-1]),
        mask.reshape(size, num_tokens),
    )
    return jax.tree.map(lambda y: y.reshape(*batch, *y.shape[1:]), flat)
