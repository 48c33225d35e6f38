"""CLIP's image embeddings (Radford et al. 2021, arXiv:2103.00020): ViT-B/32 and ViT-L/14.

The network of github.com/openai/CLIP, whose names the weights have. Pictures of a table are
compared by the cosine of their embeddings.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from fourdstar_jax.perceptual import vit, weights
from fourdstar_jax.types import Array

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of pictures in [0, 1]
STD = (0.26862954, 0.26130258, 0.27577711)
EPS = 1e-5  # of the LayerNorms
LAYER = "transformer.resblocks."
# array of a layer: where it is in the weights
PARTS = {
    "norm1": "ln_1.weight",
    "norm1_bias": "ln_1.bias",
    "qkv": "attn.in_proj_weight",
    "qkv_bias": "attn.in_proj_bias",
    "out": "attn.out_proj.weight",
    "out_bias": "attn.out_proj.bias",
    "norm2": "ln_2.weight",
    "norm2_bias": "ln_2.bias",
    "up": "mlp.c_fc.weight",
    "up_bias": "mlp.c_fc.bias",
    "down": "mlp.c_proj.weight",
    "down_bias": "mlp.c_proj.bias",
}
OUTER = (
    *("conv1.weight", "class_embedding", "positional_embedding", "ln_pre.weight", "ln_pre.bias"),
    *("ln_post.weight", "ln_post.bias", "proj"),
)


class Sizes(NamedTuple):
    """Of one of the two networks: pixels of a patch, width, number of layers, embedding."""

    patch: int
    width: int
    layers: int
    dim: int
    side: int = 224  # pixels of a picture


NETWORKS = {"ViT-B/32": Sizes(32, 768, 12, 512), "ViT-L/14": Sizes(14, 1024, 24, 768)}


@struct.dataclass
class CLIP:
    """The image tower; `layers` are stacked by name of PARTS, `outer` by the original's names."""

    outer: dict[str, Any]
    layers: dict[str, Any]
    digest: str = struct.field(pytree_node=False, default="")  # of the arrays

    @property
    def patch(self) -> int:
        """Pixels a side of a patch."""
        return self.outer["conv1.weight"].shape[-1]

    @property
    def side(self) -> int:
        """Pixels a side of a picture."""
        return self.patch * round((self.outer["positional_embedding"].shape[0] - 1) ** 0.5)

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Float[Array, "*b d"]:
        """Embeddings of pictures in [0, 1], not of unit length. Raises ValueError for other sizes.

        How pictures come to 224x224 pixels is a protocol's to say.
        """
        h, w = images.shape[-3:-1]
        if (h, w) != (self.side, self.side):
            raise ValueError(f"pictures of {w}x{h} pixels; CLIP takes {self.side}x{self.side}")
        outer = self.outer
        x = ((images - jnp.array(MEAN)) / jnp.array(STD)).reshape(-1, h, w, 3)
        x = vit.patches(x, outer["conv1.weight"])
        first = jnp.broadcast_to(outer["class_embedding"], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1) + outer["positional_embedding"]
        x = vit.norm(x, outer["ln_pre.weight"], outer["ln_pre.bias"], EPS)
        x = vit.blocks(x, self.layers, eps=EPS, quick_gelu=True)
        x = vit.norm(x[:, 0], outer["ln_post.weight"], outer["ln_post.bias"], EPS)
        return (x @ outer["proj"]).reshape(*images.shape[:-3], -1)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights."""
    patch, width, layers, dim, side = sizes
    found: dict[str, tuple[int, ...]] = {
        "conv1.weight": (width, 3, patch, patch),
        "class_embedding": (width,),
        "positional_embedding": ((side // patch) ** 2 + 1, width),
        "proj": (width, dim),
    }
    found |= {name: (width,) for name in OUTER if name not in found}
    for i in range(layers):
        for part in PARTS.values():
            lead = {"in_proj": 3 * width, "c_fc": 4 * width}.get(part.split(".")[-2], width)
            lead = 3 * width if "in_proj" in part else lead
            tail = () if part.startswith("ln") or part.endswith("bias") else (width,)
            if part == "mlp.c_proj.weight":
                tail = (4 * width,)
            found[f"{LAYER}{i}.{part}"] = (lead, *tail)
    return found


def build(arrays: dict[str, np.ndarray], digest: str = "") -> CLIP:
    """The network of arrays with the original's names, in float32."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        count = sum(name.endswith(PARTS["norm1"]) for name in arrays)
        outer = {name: jnp.asarray(arrays[name], jnp.float32) for name in OUTER}
        layers = {
            name: jnp.stack(
                [jnp.asarray(arrays[f"{LAYER}{i}.{part}"], jnp.float32) for i in range(count)]
            )
            for name, part in PARTS.items()
        }
    return CLIP(outer, layers, digest)


def load(path: str | os.PathLike[str], network: str) -> CLIP:
    """One of NETWORKS with the weights that `fourdstar convert clip` wrote, on the CPU.

    Raises ValueError where the file is absent or holds other names or shapes. Its digest is not
    pinned: the result of a measurement tells it.
    """
    wanted, made_by = shapes(NETWORKS[network]), f"`fourdstar convert clip FILE {path}`"
    return build(*weights.read_shapes(path, f"CLIP {network}", wanted, made_by=made_by))
