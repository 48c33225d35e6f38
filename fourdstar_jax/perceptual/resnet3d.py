"""3D-ResNet50 of Kinetics: 2,048 features of 16 frames, those of DisCo's FID-VID.

Hara et al. 2018 (arXiv:1711.09577), github.com/kenshohara/3D-ResNets-PyTorch, depth 50 with
convolutions as shortcuts (type B), whose names the weights have.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Float

from fourdstar_jax.perceptual import weights
from fourdstar_jax.perceptual.weights import Conv
from fourdstar_jax.types import Array

MEAN = (114.7748, 107.7354, 99.4750)  # of values 0 to 255, which it was trained with
EPS = 1e-5  # of the batch norms
BLOCKS = (3, 4, 6, 3)
WIDTHS = (64, 128, 256, 512)
GROWTH = 4  # of the last convolution of a block
SIZE, FRAMES = 112, 16
NORM = ("weight", "bias", "running_mean", "running_var")


@struct.dataclass
class ResNet3D:
    """The network; `convs` by the original's names, their norms folded in."""

    convs: dict[str, Conv]
    digest: str = struct.field(pytree_node=False, default="")  # of the arrays

    def __call__(self, videos: Float[Array, "*b T h w 3"]) -> Float[Array, "*b d"]:
        """Features of clips in [0, 1], averaged over places and time.

        They are of 112x112 pixels and 16 frames where figures are to be DisCo's; values count from
        0 to 255, less MEAN.
        """
        x = (255 * jnp.asarray(videos) - jnp.array(MEAN)).reshape(-1, *videos.shape[-4:])
        x = self._run("conv1", x, stride=(1, 2, 2), padding=3)
        x = jnp.pad(x, [(0, 0), *[(1, 1)] * 3, (0, 0)])  # nothing is below zero here
        x = nnx.max_pool(x, (3, 3, 3), (2, 2, 2))
        stage, block = 1, 0
        while (name := f"layer{stage}.{block}") + ".conv1" in self.convs:
            x = self._bottleneck(name, x, stride=2 if stage > 1 and block == 0 else 1)
            last = f"layer{stage}.{block + 1}.conv1" not in self.convs
            stage, block = (stage + 1, 0) if last else (stage, block + 1)
        return jnp.mean(x, axis=(1, 2, 3)).reshape(*videos.shape[:-4], -1)

    def _bottleneck(self, name: str, x: Array, *, stride: int) -> Array:
        y = self._run(f"{name}.conv1", x)
        y = self._run(f"{name}.conv2", y, stride=(stride,) * 3, padding=1)
        y = self._conv(f"{name}.conv3", y)
        if (shortcut := f"{name}.downsample.0") in self.convs:
            x = self._conv(shortcut, x, stride=(stride,) * 3)
        return nnx.relu(x + y)

    def _run(self, name: str, x: Array, **options) -> Array:
        return nnx.relu(self._conv(name, x, **options))

    def _conv(self, name: str, x: Array, *, stride=(1, 1, 1), padding: int = 0) -> Array:
        return self.convs[name](x, stride=stride, padding=[(padding, padding)] * 3)


def norm_of(conv: str) -> str:
    """The name of a convolution's norm."""
    return conv[:-1] + "1" if conv.endswith("downsample.0") else conv.replace("conv", "bn")


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, din: int, dout: int, size: int) -> None:
        found[f"{name}.weight"] = (dout, din, size, size, size)
        found.update({f"{norm_of(name)}.{part}": (dout,) for part in NORM})

    conv("conv1", 3, WIDTHS[0], 7)
    din = WIDTHS[0]
    for stage, (count, width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), 1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            conv(f"{name}.conv1", din, width, 1)
            conv(f"{name}.conv2", width, width, 3)
            conv(f"{name}.conv3", width, GROWTH * width, 1)
            if block == 0:
                conv(f"{name}.downsample.0", din, GROWTH * width, 1)
            din = GROWTH * width
    return found


def build(arrays: dict[str, np.ndarray], digest: str = "") -> ResNet3D:
    """The network of arrays with the original's names, in float32."""
    convs = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name, kernel in arrays.items():
            if kernel.ndim != 5:
                continue
            conv = name.removesuffix(".weight")
            gamma, beta, mean, var = (arrays[f"{norm_of(conv)}.{part}"] for part in NORM)
            kernel = kernel.transpose(2, 3, 4, 1, 0)  # torch has out, in, frames, rows, columns
            convs[conv] = weights.fold_norm(kernel, beta, mean, var, eps=EPS, gamma=gamma)
    return ResNet3D(convs, digest)


def load(path: str | os.PathLike[str]) -> ResNet3D:
    """The network with the weights that `fourdstar convert resnet3d` wrote, on the CPU.

    Raises ValueError where the file is absent or holds other names or shapes. Its digest is not
    pinned: the result of a measurement tells it.
    """
    made_by = f"`fourdstar convert resnet3d FILE {path}`"
    return build(*weights.read_shapes(path, "3D-ResNet50", shapes(), made_by=made_by))
