"""FLAN-T5's encoder (T5 v1.1, any size) from transformers' state dict.

The files hold the whole T5; of it the encoder and the table of token embeddings are needed. The
table is `shared.weight`, which files of torch also list under the names of both stacks. Kernels of
a kind are stacked over the layers.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.convert import rules

VERSION = 1
# of a whole T5: the other stack, its output, and two more names of the table
IGNORED: tuple[str, ...] = (
    r"decoder\..*",
    r"lm_head\..*",
    r"encoder\.embed_tokens\.weight",
)

_TABLE, _ALIAS = "shared.weight", "encoder.embed_tokens.weight"
_BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_LAYER = {
    "attention_norm/scale": "layer.0.layer_norm.weight",
    "q/kernel": "layer.0.SelfAttention.q.weight",
    "k/kernel": "layer.0.SelfAttention.k.weight",
    "v/kernel": "layer.0.SelfAttention.v.weight",
    "out/kernel": "layer.0.SelfAttention.o.weight",
    "ffn_norm/scale": "layer.1.layer_norm.weight",
    "gate/kernel": "layer.1.DenseReluDense.wi_0.weight",
    "up/kernel": "layer.1.DenseReluDense.wi_1.weight",
    "down/kernel": "layer.1.DenseReluDense.wo.weight",
}


def find(tree: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The state dict in a file's tree: its top level. Raises ValueError if that is none of T5's.

    The table may have its encoder's name alone.
    """
    state = dict(tree)
    if _TABLE not in state and _ALIAS in state:
        state[_TABLE] = state[_ALIAS]
    if missing := [name for name in (_TABLE, _BIAS) if name not in state]:
        raise ValueError(f"this is no T5 of transformers: it lacks {missing}")
    return rules.state_dict(state)


def arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Sizes of the `T5Encoder` that a state dict is of. Raises ValueError if it is not T5 v1.1."""
    q, up = (f"encoder.block.0.{_LAYER[name]}" for name in ("q/kernel", "up/kernel"))
    if missing := [name for name in (_TABLE, _BIAS, q, up) if name not in state]:
        raise ValueError(f"this is no encoder of T5 v1.1 (FLAN-T5): it lacks {missing}")
    num_buckets, num_heads = state[_BIAS].shape
    inner, dim = state[q].shape
    if inner % num_heads:
        raise ValueError(f"{q} has {inner} rows, no multiple of {num_heads} heads")
    blocks = {name.split(".")[2] for name in state if name.startswith("encoder.block.")}
    return {
        "vocab_size": state[_TABLE].shape[0],
        "dim": dim,
        "num_layers": len(blocks),
        "num_heads": num_heads,
        "head_dim": inner // num_heads,
        "hidden_dim": state[up].shape[0],
        "num_buckets": num_buckets,
    }


def rules_for(shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
    """Rules for our arrays, from their names and shapes."""
    plain = {
        "table": _TABLE,
        "distance_bias": _BIAS,
        "norm/scale": "encoder.final_layer_norm.weight",
    }
    out = []
    for ours, shape in shapes.items():
        if ours in plain:
            out.append(rules.same(plain[ours], ours))
        else:
            place = _LAYER[ours.removeprefix("layers/")]
            theirs = tuple(f"encoder.block.{i}.{place}" for i in range(shape[0]))
            out.append(_stacked(theirs, ours, transposed=ours.endswith("kernel")))
    return out


def _stacked(theirs: tuple[str, ...], ours: str, *, transposed: bool) -> rules.Rule:
    """Each layer's array, a Linear's weight [out, in] turned to [in, out], stacked."""

    def turn(x: np.ndarray) -> np.ndarray:
        return x.T if transposed else x

    return rules.Rule(
        theirs,
        (ours,),
        lambda x: [np.stack([turn(layer) for layer in x])],
        lambda x: [turn(layer) for layer in x[0]],
    )
