"""LlamaGen's VQ tokenizers (VQ-16, VQ-8; FoundationVision/LlamaGen) to our `VQ16`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.convert import rules

VERSION = 1
IGNORED: tuple[str, ...] = (r"quantize\.codebook_used",)  # the last tokens of its training

RESOLUTION = 256  # of the released models' training; no tensor's shape depends on it
_CODEBOOK = "quantize.embedding.weight"


def find(tree: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The state dict in a file's tree: the averaged weights if they are there, as LlamaGen does.

    A file of safetensors is one itself. Raises ValueError for a tree without one.
    """
    if _CODEBOOK in tree:
        return rules.state_dict(tree)
    for key in ("ema", "model", "state_dict"):
        if key in tree:
            return rules.state_dict(tree[key])
    raise ValueError(f"no ema, model or state_dict in the file: {sorted(tree)[:5]}")


def arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `tokenizer.make` that a state dict of any size was made with.

    All but `resolution` follow from shapes; that one is the released models'. Raises ValueError for
    a state dict of another kind or of an encoder and a decoder of different widths.
    """
    try:
        return _arguments(state)
    except KeyError as error:
        raise ValueError(f"not the state dict of LlamaGen's VQ: it lacks {error}") from error


def _arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    channels = state["encoder.conv_in.weight"].shape[0]

    def widths(part: str) -> list[int]:
        levels = _count(state, f"{part}.conv_blocks")
        names = [f"{part}.conv_blocks.{i}.res.0.conv1.weight" for i in range(levels)]
        return [state[name].shape[0] for name in names]

    down, up = widths("encoder"), widths("decoder")[::-1]
    if down != up:
        raise ValueError(f"an encoder of widths {down} and a decoder of {up}: they must agree")
    if any(width % channels for width in down):
        raise ValueError(f"levels of widths {down} are no multiples of the first, {channels}")
    vocab_size, code_dim = state[_CODEBOOK].shape
    return {
        "family": "vq16",
        "resolution": RESOLUTION,
        "channels": channels,
        "multipliers": [width // channels for width in down],
        "num_blocks": _count(state, "encoder.conv_blocks.0.res"),
        "z_dim": state["quant_conv.weight"].shape[1],
        "vocab_size": vocab_size,
        "code_dim": code_dim,
    }


def _count(state: Mapping[str, np.ndarray], prefix: str) -> int:
    """Count of the numbers that follow `prefix` in the names."""
    start = prefix.count(".") + 1
    return len({name.split(".")[start] for name in state if name.startswith(prefix + ".")})


def rules_for(shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
    """The rules for our arrays of these names and shapes: a plain renaming, but the quantiser."""
    shapes = dict(shapes)
    book = "quantizer/codebooks"
    del shapes[book]
    statistics = [
        rules.zeros_here("quantizer/usage", shapes.pop("quantizer/usage")),
        rules.zeros_here("quantizer/idle_steps", shapes.pop("quantizer/idle_steps"), np.int32),
    ]
    return [
        *rules.by_name(shapes, lambda name: name),
        rules.stack([_CODEBOOK], book),  # K = 1 codebooks
        *statistics,
    ]
