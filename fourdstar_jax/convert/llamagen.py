"""LlamaGen's autoregressive models (FoundationVision/LlamaGen) to arrays named as STAR's layers.

No module of ours is LlamaGen: `star.warm_start` takes of these arrays what STAR has a place for;
the others keep their plain names, so that the way back is complete. Our arrays, i counting layers:

    layers/i/{attention_norm,ffn_norm}/scale   [D]
    layers/i/{q,k,v,out}/kernel                [D, D]; theirs has q, k and v in one
    layers/i/ffn/{gate,up,down}/kernel         w1, w3 and w2 of their SwiGLU
    norm/scale, output/kernel                  [D], [D, vocab]
    tok_embeddings/embedding                   [vocab, D]
    text/mlp/{up,down}/kernel                  the captions' MLP, of the models of text
    cls_embedding/uncond_embedding             [L, C], features of no text
    cls_embedding/embedding_table/embedding    [classes, D], of the models of classes instead
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.convert import rules

VERSION = 1
# Caches of sampling, which a model that has sampled would save: they hold nothing of it.
IGNORED: tuple[str, ...] = (r"layers\.\d+\.attention\.kv_cache\.[kv]_cache",)

# Width -> attention heads, which no shape tells (LlamaGen's B, L, XL, XXL, 1B, XXXL, 3B, 7B).
NUM_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
THEIRS = {"out": "attention.wo", "ffn.gate": "feed_forward.w1", "ffn.up": "feed_forward.w3"}
THEIRS |= {"ffn.down": "feed_forward.w2"}
TEXT = {"text.mlp.up": "cls_embedding.cap_proj.fc1", "text.mlp.down": "cls_embedding.cap_proj.fc2"}


def find(tree: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The state dict in a file's tree, where LlamaGen's sampling scripts look for it.

    Raises ValueError for a tree without one.
    """
    for key in ("model", "module", "state_dict"):
        if key in tree:
            return rules.state_dict(tree[key])
    if "tok_embeddings.weight" in tree:  # saved from shards: the state dict alone
        return rules.state_dict(tree)
    raise ValueError(f"no model, module or state_dict in the file, which has {sorted(tree)}")


def arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the model that a state dict is of, for `shapes`.

    All but `num_heads` follow from shapes; that one goes with the width. Raises ValueError for a
    state dict of another kind and for a width that LlamaGen does not have.
    """
    try:
        sizes = trunk_arguments(state)
        if "cls_embedding.embedding_table.weight" in state:
            sizes["num_classes"] = state["cls_embedding.embedding_table.weight"].shape[0]
        else:
            sizes |= text_arguments(state)
        return {"family": "llamagen", **sizes, "vocab_size": state["output.weight"].shape[0]}
    except KeyError as error:
        raise ValueError(f"not the state dict of a LlamaGen: it lacks {error}") from error


def trunk_arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the layers, of MVAR's too. Raises KeyError for the name of a missing array."""
    dim = state["norm.weight"].shape[0]
    if dim not in NUM_HEADS:
        raise ValueError(f"a model of width {dim}: known are those of {sorted(NUM_HEADS)}")
    head_dim = dim // NUM_HEADS[dim]
    fused = state["layers.0.attention.wqkv.weight"].shape[0]
    return {
        "dim": dim,
        "num_layers": len({name.split(".")[1] for name in state if name.startswith("layers.")}),
        "num_heads": NUM_HEADS[dim],
        "num_kv_heads": (fused - dim) // (2 * head_dim),
        "hidden_dim": state["layers.0.feed_forward.w1.weight"].shape[0],
    }


def text_arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the text features, of MVAR's too. Raises KeyError for a missing array."""
    length, text_dim = state["cls_embedding.uncond_embedding"].shape
    return {"text_length": length, "text_dim": text_dim}


def shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of our arrays, by name, of a model of these sizes."""
    dim, vocab_size = arguments["dim"], arguments["vocab_size"]
    found = {"tok_embeddings/embedding": (vocab_size, dim), "output/kernel": (dim, vocab_size)}
    if "num_classes" in arguments:
        found["cls_embedding/embedding_table/embedding"] = (arguments["num_classes"], dim)
    else:
        found |= text_shapes(arguments)
    return found | trunk_shapes(arguments)


def trunk_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the layers' arrays and of the last norm's, of MVAR's too."""
    dim, hidden_dim = arguments["dim"], arguments["hidden_dim"]
    kv_dim = dim // arguments["num_heads"] * arguments["num_kv_heads"]
    layer = {
        "attention_norm/scale": (dim,),
        "q/kernel": (dim, dim),
        "k/kernel": (dim, kv_dim),
        "v/kernel": (dim, kv_dim),
        "out/kernel": (dim, dim),
        "ffn_norm/scale": (dim,),
        "ffn/gate/kernel": (dim, hidden_dim),
        "ffn/up/kernel": (dim, hidden_dim),
        "ffn/down/kernel": (hidden_dim, dim),
    }
    found: dict[str, tuple[int, ...]] = {"norm/scale": (dim,)}
    for i in range(arguments["num_layers"]):
        found |= {f"layers/{i}/{name}": shape for name, shape in layer.items()}
    return found


def text_shapes(arguments: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the text's arrays, of MVAR's too."""
    dim, text_dim = arguments["dim"], arguments["text_dim"]
    return {
        "cls_embedding/uncond_embedding": (arguments["text_length"], text_dim),
        "text/mlp/up/kernel": (text_dim, dim),
        "text/mlp/down/kernel": (dim, dim),
    }


def rules_for(shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
    """The rules for our arrays of these names and shapes, of MVAR's too.

    All of them are plain renamings, but that q, k and v are one array of theirs.
    """
    rest = dict(shapes)
    fused = []
    for layer in sorted({name.split("/")[1] for name in shapes if name.startswith("layers/")}):
        names = [f"layers/{layer}/{part}/kernel" for part in "qkv"]
        sizes = [rest.pop(name)[1] for name in names]
        fused.append(rules.split(f"layers.{layer}.attention.wqkv.weight", names, sizes))
    return fused + rules.by_name(rest, _their_name)


def _their_name(name: str) -> str:
    found = re.fullmatch(r"(layers\.\d+\.)(.+)(\.weight)", name)
    if found:
        start, part, end = found.groups()
        return start + THEIRS.get(part, part) + end
    for ours, theirs in TEXT.items():
        name = name.replace(ours, theirs)
    return name
