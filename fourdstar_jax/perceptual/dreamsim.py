"""DreamSim's embeddings of pictures (Fu et al. 2023, arXiv:2306.09344): the ensemble.

Three ViT-B/16 side by side: DINO's class token after the last block, and the embeddings of OpenAI's
CLIP and of OpenCLIP, each tuned by LoRA to what people call alike. The network of
github.com/ssundaram21/dreamsim, whose names the weights have, with the LoRA merged.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float

from fourdstar_jax.perceptual import clip, vit, weights
from fourdstar_jax.types import Array

SIDE, PATCH, WIDTH, LAYERS = 224, 16, 768, 12
LAYER = "blocks."
# array of a layer: where it is in the weights
PARTS = {
    "norm1": "norm1.weight",
    "norm1_bias": "norm1.bias",
    "qkv": "attn.qkv.weight",
    "qkv_bias": "attn.qkv.bias",
    "out": "attn.proj.weight",
    "out_bias": "attn.proj.bias",
    "norm2": "norm2.weight",
    "norm2_bias": "norm2.bias",
    "up": "mlp.fc1.weight",
    "up_bias": "mlp.fc1.bias",
    "down": "mlp.fc2.weight",
    "down_bias": "mlp.fc2.bias",
}
OUTER = ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token", "pos_embed")
OF_CLIP = ("pos_drop.weight", "pos_drop.bias", "norm.weight", "norm.bias", "proj")


class Branch(NamedTuple):
    """What the three differ in."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    eps: float
    quick_gelu: bool
    dim: int  # of the projection; 0 is the class token itself


BRANCHES = {  # in the ensemble's order
    "dino": Branch((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1e-6, False, 0),
    "clip": Branch(clip.MEAN, clip.STD, clip.EPS, True, 512),
    "open_clip": Branch(clip.MEAN, clip.STD, clip.EPS, False, 512),
}


@struct.dataclass
class DreamSim:
    """The ensemble; of each branch, `layers` are stacked by name of PARTS, `outer` by its own."""

    outer: dict[str, dict[str, Any]]
    layers: dict[str, dict[str, Any]]
    digest: str = struct.field(pytree_node=False, default="")  # of the arrays

    @property
    def side(self) -> int:
        """Pixels a side of a picture."""
        outer = self.outer["dino"]
        tokens = outer["pos_embed"].shape[1] - 1
        return outer["patch_embed.proj.weight"].shape[-1] * round(tokens**0.5)

    def __call__(self, images: Float[Array, "*b h w 3"]) -> Float[Array, "*b d"]:
        """Embeddings of pictures in [0, 1], their mean taken away, not of unit length.

        DreamSim is 1 less the cosine of two. Raises ValueError for sizes but 224x224 pixels; how
        pictures come to that is a protocol's to say (the original: bicubic, whole picture).
        """
        h, w = images.shape[-3:-1]
        if (h, w) != (self.side, self.side):
            raise ValueError(f"pictures of {w}x{h} pixels; DreamSim takes {self.side}x{self.side}")
        flat = images.reshape(-1, h, w, 3)
        found = [
            _embedded(branch, self.outer[name], self.layers[name], flat)
            for name, branch in BRANCHES.items()
        ]
        x = jnp.concatenate(found, axis=-1)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return x.reshape(*images.shape[:-3], -1)


def _embedded(branch: Branch, outer: dict[str, Any], layers: dict[str, Any], images: Array):
    x = (images - jnp.array(branch.mean)) / jnp.array(branch.std)
    x = vit.patches(x, outer["patch_embed.proj.weight"]) + outer["patch_embed.proj.bias"]
    first = jnp.broadcast_to(outer["cls_token"], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + outer["pos_embed"]
    if branch.dim:
        x = vit.norm(x, outer["pos_drop.weight"], outer["pos_drop.bias"], branch.eps)
    x = vit.blocks(x, layers, eps=branch.eps, quick_gelu=branch.quick_gelu)[:, 0]
    if branch.dim:
        x = vit.norm(x, outer["norm.weight"], outer["norm.bias"], branch.eps) @ outer["proj"]
    return x


def shapes(
    branch: Branch,
    *,
    side: int = SIDE,
    patch: int = PATCH,
    width: int = WIDTH,
    layers: int = LAYERS,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a branch's weights."""
    found: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "cls_token": (1, 1, width),
        "pos_embed": (1, (side // patch) ** 2 + 1, width),
    }
    if branch.dim:
        found |= {name: (width,) for name in OF_CLIP} | {"proj": (width, branch.dim)}
    for i in range(layers):
        for name, part in PARTS.items():
            array = name.removesuffix("_bias")
            lead = {"qkv": 3, "up": 4}.get(array, 1) * width
            tail = () if name.endswith("_bias") or array.startswith("norm") else (width,)
            tail = (4 * width,) if name == "down" else tail
            found[f"{LAYER}{i}.{part}"] = (lead, *tail)
    return found


def all_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the ensemble's weights."""
    return {f"{n}.{name}": x for n, b in BRANCHES.items() for name, x in shapes(b).items()}


def build(arrays: dict[str, np.ndarray], digest: str = "") -> DreamSim:
    """The ensemble of arrays named BRANCH.NAME, in float32."""
    outer: dict[str, dict[str, Any]] = {}
    layers: dict[str, dict[str, Any]] = {}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for name, branch in BRANCHES.items():
            own = {
                n.removeprefix(f"{name}."): x for n, x in arrays.items() if n.startswith(f"{name}.")
            }
            count = sum(n.endswith(PARTS["qkv"]) for n in own)
            kept = (*OUTER, *(OF_CLIP if branch.dim else ()))
            outer[name] = {n: jnp.asarray(own[n], jnp.float32) for n in kept}
            layers[name] = {
                part: jnp.stack(
                    [jnp.asarray(own[f"{LAYER}{i}.{n}"], jnp.float32) for i in range(count)]
                )
                for part, n in PARTS.items()
            }
    return DreamSim(outer, layers, digest)


def load(path: str | os.PathLike[str]) -> DreamSim:
    """The ensemble with the weights that `fourdstar convert dreamsim` wrote, on the CPU.

    Raises ValueError where the file is absent or holds other names or shapes. Its digest is not
    pinned: the result of a measurement tells it.
    """
    made_by = f"`fourdstar convert dreamsim FOLDER {path}`"
    return build(*weights.read_shapes(path, "DreamSim", all_shapes(), made_by=made_by))
