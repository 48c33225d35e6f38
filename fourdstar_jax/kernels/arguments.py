"""Arguments of the public functions: arrays from whatever stands for one, and whole numbers."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_array(name: str, value: Any, kind: str) -> Any:
    """An array of `kind`, "floats", "integers" or "bools", as it is; or one of a list or scalar.

    Python's numbers are taken as float32 where floats are wanted, whole ones too.
    Raises ValueError with the argument's name for anything else.
    """
    if not isinstance(value, jax.Array | np.ndarray | np.generic):
        leaves = jax.tree.leaves(value)
        ours = any(isinstance(x, jax.Array) or hasattr(x, "__jax_array__") for x in leaves)
        try:
            value = jnp.asarray(value) if ours else np.asarray(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} must be an array of {kind}, or lists that make one") from None
        if kind == "floats" and (value.dtype.kind in "iu" or value.dtype == np.float64):
            value = value.astype(np.float32)
        elif value.size == 0:
            value = value.astype({"floats": np.float32, "integers": np.int32, "bools": bool}[kind])
    wanted = {"floats": jnp.floating, "integers": jnp.integer, "bools": jnp.bool_}[kind]
    if not jnp.issubdtype(value.dtype, wanted):
        raise ValueError(f"{name} must hold {kind}, not {value.dtype}")
    return value


def widest_float(arrays: Any) -> Any:
    """float64 if an array of a tree is that, and JAX has it enabled; else float32."""
    kept = (jax.dtypes.canonicalize_dtype(x.dtype) for x in jax.tree.leaves(arrays))
    return jnp.float64 if any(dtype == jnp.float64 for dtype in kept) else jnp.float32


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high`. Raises ValueError with its name for anything else."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:  # JAX's error for a traced number is one, too
        raise ValueError(f"{name}={value!r} must be a whole number, known when compiling") from None
    if number < low or (high is not None and number > high):
        span = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={number} must be {span}")
    return number
