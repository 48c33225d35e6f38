"""The released UniTok (FoundationVision/UniTok, ViTamin-L) to our `UniTok`."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from fourdstar_jax.convert import rules

VERSION = 1
# the CLIP side: its text tower, and what maps a picture's mean code to CLIP's space
IGNORED: tuple[str, ...] = (r"text_encoder\..*", r"fc_norm\..*", r"projection\..*", r"logit_scale")

RESOLUTION = 256  # of the released model; no tensor's shape depends on it
HEAD_DIM = 64  # of ViTamin's blocks at every size
_RENAMES = [
    (r"^encoder\.patch_embed\.(conv1|norm1|conv2)\.", r"encoder.patch_embed.backbone.stem.\1."),
    (r"^encoder\.patch_embed\.stages\.", "encoder.patch_embed.backbone.stages."),
    (r"^(encoder\..*)\.shortcut\.", r"\1.shortcut.expand."),
    (r"^encoder\.patch_embed\.pool_norm\.", "encoder.patch_embed.backbone.pool.norm."),
    (r"^encoder\.patch_embed\.pool\.", "encoder.patch_embed.backbone.pool.proj."),
    (r"^decoder\.tail\.up\.up_conv1\.", "decoder.up_conv1.conv."),
    (r"^decoder\.tail\.up\.stages\.0\.", "decoder.up_conv2."),
    (r"^decoder\.tail\.up\.stages\.1\.", "decoder.up_conv3."),
    (r"^(decoder\..*)\.(shortcut|up)\.", r"\1.\2.conv."),
    (r"^decoder\.tail\.conv1\.", "decoder.up_conv4.conv1.conv."),
    (r"^decoder\.tail\.", "decoder.up_conv4."),
]


def find(tree: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The state dict in a file's tree: under trainer, unitok, or all of it.

    Raises ValueError for a tree without one.
    """
    if "encoder.norm.weight" in tree:
        return rules.state_dict(tree)
    trainer = tree.get("trainer")
    if isinstance(trainer, Mapping) and "unitok" in trainer:
        return rules.state_dict(trainer["unitok"])
    raise ValueError(f"no trainer.unitok in the file: {sorted(map(str, tree))[:5]}")


def arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of `tokenizer.make` that a state dict of any size was made with.

    All but `resolution` and the width of a head follow from shapes; those two are the released
    model's. Raises ValueError for a state dict of another kind.
    """
    try:
        return _arguments(state)
    except KeyError as error:
        raise ValueError(f"not the state dict of UniTok: it lacks {error}") from error


def _arguments(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    def count(pattern: str) -> int:
        found = {m.group(1) for name in state if (m := re.match(pattern, name))}
        return len(found)

    def width(name: str) -> int:
        return state[f"{name}.weight"].shape[0]

    backbone = "encoder.patch_embed.backbone"
    stages = [f"{backbone}.stages.{s}" for s in range(count(rf"{backbone}\.stages\.(\d+)\."))]
    ups = ["decoder.up_conv2", "decoder.up_conv3"]
    dim = width("encoder.norm")
    vocab_size, chunk = state["quantizer.codebooks.0.codebook.weight"].shape
    num_codebooks = count(r"quantizer\.codebooks\.(\d+)\.")
    return {
        "family": "unitok",
        "resolution": RESOLUTION,
        "stem": "hybrid",
        "stem_channels": [
            width(f"{backbone}.stem.conv1"),
            *(width(f"{stage}.0.conv3_1x1") for stage in stages),
        ],
        "stem_depths": [count(rf"{stage}\.(\d+)\.") for stage in stages],
        "dim": dim,
        "num_blocks": count(r"encoder\.blocks\.(\d+)\."),
        "num_decoder_blocks": count(r"decoder\.blocks\.(\d+)\."),
        "num_heads": dim // HEAD_DIM,
        "hidden_dim": width("encoder.blocks.0.mlp.w0"),
        "tail": "hybrid",
        "tail_channels": [
            width("decoder.up_conv1.conv"),
            *(width(f"{up}.0.conv3_1x1") for up in ups),
        ],
        "tail_depths": [count(rf"{up}\.(\d+)\.") for up in ups],
        "num_codebooks": num_codebooks,
        "vocab_size": vocab_size,
        "code_dim": num_codebooks * chunk,
        "learned_positions": False,
    }


def rules_for(shapes: Mapping[str, tuple[int, ...]]) -> list[rules.Rule]:
    """The rules for our arrays of these names and shapes.

    Theirs also hold a position embedding and biases of the projections' keys, all of them frozen
    zeros.
    """
    shapes = dict(shapes)
    num_codebooks = shapes.pop("quantizer/codebooks")[0]
    books = [f"quantizer.codebooks.{k}" for k in range(num_codebooks)]
    shapes.pop("quantizer/usage")
    out = [
        rules.stack([f"{book}.codebook.weight" for book in books], "quantizer/codebooks"),
        rules.stack([f"{book}.vocab_usage" for book in books], "quantizer/usage"),
        rules.zeros_here("quantizer/idle_steps", shapes.pop("quantizer/idle_steps"), np.int32),
        rules.zeros_there("encoder.pos_embed", (1, 1, shapes["encoder/norm/scale"][0])),
    ]
    for part in ("quant_proj", "post_quant_proj"):
        zeros = shapes[f"{part}/attn/q_bias"]
        out.append(rules.zeros_there(f"{part}.attn.zero_k_bias", zeros))
    return out + rules.by_name(shapes, _rename)


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
