"""Density-peaks clustering over k nearest neighbours (DPC-KNN), whole or one group at a time."""

from fourdstar_jax.kernels.dpc_knn.api import cluster_dpc_knn
from fourdstar_jax.kernels.dpc_knn.reference import Clusters, Peaks, cluster, find_clusters
from fourdstar_jax.kernels.dpc_knn.streaming import add_group, clusters_before, empty_peaks

__all__ = [
    "Clusters",
    "Peaks",
    "add_group",
    "cluster",
    "cluster_dpc_knn",
    "clusters_before",
    "empty_peaks",
    "find_clusters",
]
