"""Density-peaks clustering over k nearest neighbours (DPC-KNN), whole or one group at a time."""

from fourdstar_jax.kernels.dpc_knn.api import Clusters, cluster_dpc_knn

__all__ = ["Clusters", "cluster_dpc_knn"]
