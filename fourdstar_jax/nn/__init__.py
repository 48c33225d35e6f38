"""Layers that two models or more use. What every model needs stands here; the rest by module."""

from fourdstar_jax.nn.attention import Attention, attend, attend_short
from fourdstar_jax.nn.group_attention import attend_groups
from fourdstar_jax.nn.linear import (
    Common,
    CommonInit,
    Dtype,
    Mlp,
    Saves,
    SwiGLU,
    build,
    cast_weights,
    count_parameters,
    host_weights,
    joined,
    linear,
    named_arrays,
    recomputed,
    stack_layers,
)

__all__ = [
    "Attention",
    "Common",
    "CommonInit",
    "Dtype",
    "Mlp",
    "Saves",
    "SwiGLU",
    "attend",
    "attend_groups",
    "attend_short",
    "build",
    "cast_weights",
    "count_parameters",
    "host_weights",
    "joined",
    "linear",
    "named_arrays",
    "recomputed",
    "stack_layers",
]
