"""Weights of the networks that measure pictures: .npz files whose content is pinned by a digest."""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from fourdstar_jax import remote
from fourdstar_jax.types import Array


class Conv(NamedTuple):
    """A convolution without a norm: that of the network is folded into it."""

    kernel: Float[Array, "*window din dout"]
    bias: Float[Array, " dout"]

    def __call__(
        self,
        x: Float[Array, "b *size din"],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: str | Sequence[tuple[int, int]] = "SAME",
    ) -> Array:
        """The convolution with bias, channels last; `stride` is for all axes or of each."""
        axes = {4: "HW", 5: "DHW"}[self.kernel.ndim]
        y = jax.lax.conv_general_dilated(
            jnp.asarray(x),
            jnp.asarray(self.kernel, x.dtype),
            window_strides=stride if isinstance(stride, tuple) else (stride,) * len(axes),
            padding=padding,
            dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        )
        return y + jnp.asarray(self.bias, x.dtype)


def fold_norm(
    kernel: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    var: np.ndarray,
    *,
    eps: float,
    gamma: np.ndarray | float = 1.0,
) -> Conv:
    """The convolution that equals one without bias followed by a batch norm of scale `gamma`."""
    size = np.float64(gamma) / np.sqrt(np.float64(var) + eps)
    shift = np.float64(beta) - mean * size
    folded = np.float64(kernel) * size
    return Conv(jnp.asarray(folded, jnp.float32), jnp.asarray(shift, jnp.float32))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the file they came in."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def read(
    path: str | os.PathLike[str], networks: Mapping[str, str], *, made_by: str
) -> tuple[str, dict[str, np.ndarray]]:
    """Which of `networks`, whose digests are given, an .npz holds, and its arrays.

    `made_by` tells a user how to make the file. Raises ValueError where the file is absent or
    holds anything else.
    """
    names = " or ".join(networks)
    arrays = read_arrays(path, names, made_by=made_by)
    found = digest(arrays)
    for name, wanted in networks.items():
        if found == wanted:
            return name, arrays
    raise ValueError(
        f"{path}: not the weights of {names}: digest {found}, not {' or '.join(networks.values())}"
    )


def read_arrays(path: str | os.PathLike[str], names: str, *, made_by: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz, whatever they are. Raises ValueError as `read` does."""
    path = remote.fetched(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the weights of {names} are made by {made_by}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except ValueError as error:  # NumPy advises to unpickle it
        raise ValueError(f"{path}: no .npz of arrays") from error
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: no .npz of arrays: {error}") from error


def read_shapes(
    path: str | os.PathLike[str],
    network: str,
    wanted: Mapping[str, tuple[int, ...]],
    *,
    made_by: str,
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a network whose digest is not pinned, and their digest.

    Raises ValueError as `read` does, for other names or shapes than those `wanted`, and for values
    that are not finite.
    """
    arrays = read_arrays(path, network, made_by=made_by)
    found = {name: x.shape for name, x in arrays.items()}
    if found != wanted:
        name = min(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
        raise ValueError(
            f"{path}: not the weights of {network}: {name} is {found.get(name, 'missing')}, "
            f"not {wanted.get(name, 'there')}"
        )
    for name, x in arrays.items():
        if x.dtype.kind != "f" or not np.isfinite(x).all():
            raise ValueError(f"{path}: {name} holds {x.dtype} that are not all finite numbers")
    return arrays, digest(arrays)
