"""Image tokenizers, images to integers and back: UniTok's family, LlamaGen's VQ, a local one."""

import importlib
from typing import Any

# Codes of the released tokenizers, both of 16 x 16 tokens an image of 256 pixels: what the configs
# of the stages after one must agree on.
RELEASED = {
    "unitok": {"num_codebooks": 8, "vocab_size": 4096, "code_dim": 64},  # arXiv:2502.20321
    "vq16": {"num_codebooks": 1, "vocab_size": 16384, "code_dim": 8},  # arXiv:2406.06525
}

# Codes of the local tokenizer at the scales that train their own.
LOCAL = {
    "tiny": {"num_codebooks": 8, "vocab_size": 64, "code_dim": 32},
    "small": {"num_codebooks": 8, "vocab_size": 512, "code_dim": 64},
}

# Arguments of the released `unitok.UniTok`; `convert.unitok` finds the same in its file.
UNITOK: dict[str, Any] = dict(
    resolution=256,
    stem="hybrid",
    stem_channels=(160, 160, 320),
    stem_depths=(2, 4),
    dim=1024,
    num_blocks=31,
    num_decoder_blocks=31,
    num_heads=16,
    hidden_dim=2048,
    tail="hybrid",
    tail_channels=(320, 320, 160),
    tail_depths=(4, 2),
    learned_positions=False,
    **RELEASED["unitok"],
)


def choose(tokenizer: str, scale: str) -> str:
    """The tokenizer that a config's scale builds on: the named one, or for "" the scale's own.

    That is the local one where there is one, else UniTok. Raises ValueError where the scale has no
    such tokenizer: `unitok` goes with all.
    """
    tokenizer = tokenizer or ("local" if scale in LOCAL else "unitok")
    released = {name: ("base", "paper") for name in RELEASED if name != "unitok"}
    scales = {"unitok": None, **released, "local": tuple(LOCAL)}
    if tokenizer not in scales:
        raise ValueError(f"{tokenizer=} must be one of {sorted(scales)}")
    allowed = scales[tokenizer]
    if allowed is not None and scale not in allowed:
        raise ValueError(
            f"{tokenizer=} goes with the scales {' and '.join(allowed)}, not {scale!r}"
        )
    return tokenizer


# family -> module and class; a module is imported when its family is made
FAMILIES = {
    "unitok": ("fourdstar_jax.tokenizer.unitok", "UniTok"),
    "vq16": ("fourdstar_jax.tokenizer.vq16", "VQ16"),
    "local": ("fourdstar_jax.tokenizer.local", "LocalTokenizer"),
}


def make(family: str = "unitok", **arguments: Any) -> Any:
    """A tokenizer, behind `base.Tokenizer`, from the arguments of its family's constructor.

    `family` is one of FAMILIES. Configs and bundles name it beside the other arguments; those that
    do not are of UniTok's family. Raises ValueError for another one.
    """
    return class_of(family)(**arguments)


def class_of(family: str) -> Any:
    """The class of one of FAMILIES. Raises ValueError for another one."""
    if family not in FAMILIES:
        raise ValueError(f"tokenizer {family=} must be one of {', '.join(FAMILIES)}")
    module, name = FAMILIES[family]
    return getattr(importlib.import_module(module), name)
