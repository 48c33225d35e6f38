"""MVAR's models (Jiakui/MV-AR, arXiv:2506.18527) to arrays named as STAR's layers.

A LlamaGen (see `convert.llamagen` for the names of what they share) with more, under plain names:

    layers/i/ada_linear/{kernel,bias}       AdaLN from the mean of the text
    cam_patchify/proj/{kernel,bias}         convolution of Plücker rays, [16, 16, 6, D] and [D]
    tok_embeddings/embedding                one row more than there are tokens: the start
    condition_layers/j/{fc1,fc2}/kernel     adds the warped reference image; these three are only
    image_warp/...                          in the model of images (image_condition.pt), the model
    align_projector/{fc1,fc2}/kernel        of texts (text_condition.pt) goes without
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.convert import llamagen, rules

VERSION = 1
IGNORED: tuple[str, ...] = llamagen.IGNORED

PREFIX = "module."  # of names saved from a model spread over devices
_RAYS = "cam_patchify.proj.weight"


def find(tree: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The state dict in a file's tree, where LlamaGen's would be, without the names' "module.".

    MVAR's scripts drop the first seven characters of every name unseen. Raises ValueError for a
    tree without a state dict.
    """
    bare = f"{PREFIX}tok_embeddings.weight" in tree
    state = rules.state_dict(tree) if bare else llamagen.find(tree)
    return {name.removeprefix(PREFIX): array for name, array in state.items()}


def arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the model that a state dict is of, for `shapes`.

    All but `num_heads` follow from shapes; that one goes with the width, as in LlamaGen. Raises
    ValueError for a state dict of another kind and for a width that LlamaGen does not have.
    """
    try:
        sizes = {
            "family": "mvar",
            **llamagen.trunk_arguments(state),
            **llamagen.text_arguments(state),
            "vocab_size": state["output.weight"].shape[0],
            "patch": state[_RAYS].shape[-1],
        }
    except KeyError as error:
        raise ValueError(f"not the state dict of an MVAR: it lacks {error}") from error
    numbers = {name.split(".")[1] for name in state if name.startswith("condition_layers.")}
    sizes["num_condition_layers"] = len(numbers)  # 0: the model of texts
    if "align_projector.fc2.weight" in state:
        sizes["align_dim"], sizes["align_hidden_dim"] = state["align_projector.fc2.weight"].shape
    return sizes


def shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of our arrays, by name, of a model of these sizes."""
    dim, vocab_size, patch = arguments["dim"], arguments["vocab_size"], arguments["patch"]
    found = {
        "tok_embeddings/embedding": (vocab_size + 1, dim),
        "output/kernel": (dim, vocab_size),
        "cam_patchify/proj/kernel": (patch, patch, 6, dim),
        "cam_patchify/proj/bias": (dim,),
        **llamagen.text_shapes(arguments),
        **llamagen.trunk_shapes(arguments),
    }
    for i in range(arguments["num_layers"]):
        found[f"layers/{i}/ada_linear/kernel"] = (dim, 6 * dim)
        found[f"layers/{i}/ada_linear/bias"] = (6 * dim,)
    for i in range(arguments["num_condition_layers"]):
        found |= {f"condition_layers/{i}/{name}/kernel": (dim, dim) for name in ("fc1", "fc2")}
    if arguments["num_condition_layers"]:
        found |= _warp_shapes(arguments)
    if "align_dim" in arguments:
        align_dim, hidden_dim = arguments["align_dim"], arguments["align_hidden_dim"]
        found["align_projector/fc1/kernel"] = (dim, hidden_dim)
        found["align_projector/fc2/kernel"] = (hidden_dim, align_dim)
    return found


def _warp_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The block that warps the reference image to a view."""
    dim, hidden_dim = arguments["dim"], arguments["hidden_dim"]
    kv_dim = dim // arguments["num_heads"] * arguments["num_kv_heads"]
    block = {
        "ada_linear/kernel": (dim, 9 * dim),
        "ada_linear/bias": (9 * dim,),
        "self_attn_norm/scale": (dim,),
        "self_attn/wqkv/kernel": (dim, dim + 2 * kv_dim),
        "self_attn/wo/kernel": (dim, dim),
        "cross_attn_norm/scale": (dim,),
        "cross_attn/norm/scale": (dim,),
        "cross_attn/wq/kernel": (dim, dim),
        "cross_attn/wkv/kernel": (dim, 2 * kv_dim),
        "cross_attn/wo/kernel": (dim, dim),
        "ffn_norm/scale": (dim,),
        "ffn/w1/kernel": (dim, hidden_dim),
        "ffn/w3/kernel": (dim, hidden_dim),
        "ffn/w2/kernel": (hidden_dim, dim),
    }
    return {f"image_warp/{name}": shape for name, shape in block.items()}


def rules_for(shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
    """The rules for our arrays of these names and shapes: LlamaGen's, and plain renamings."""
    return llamagen.rules_for(shapes)
