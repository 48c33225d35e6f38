"""Starts the decoder from an image tokenizer's: UniTok's blocks and way up, made for such codes.

What the decoder adds to them is silent at first: rays and gates of the view attentions are zero, so
that its features are those of the tokenizer's decoder. Head and offsets start anew.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fourdstar_jax import nn
from fourdstar_jax.vqvae.model import VQVAE4D

# Names of the tokenizer's arrays and of ours, whose blocks are stacked.
PLACES = (
    (r"post_quant_proj/(.+)", r"static/post_quant_proj/\1"),
    (r"decoder/blocks/\d+/(.+)", r"static/blocks/\1"),
    (r"decoder/norm/(.+)", r"static/norm/\1"),
    (r"decoder/tail/up/(.+)", r"static/up/\1"),
)
TAKEN = ("static/post_quant_proj/", "static/blocks/", "static/norm/", "static/up/")
SILENT = ("static/rays/kernel", "static/view_attentions/gate")


class Report(NamedTuple):
    """What became of the tokenizer's arrays and of the model's parameters, by name."""

    loaded: list[str]  # of the tokenizer
    skipped: list[str]  # of the tokenizer: what makes codes of pictures, and pictures of features
    fresh: list[str]  # of the model
    silent: list[str]  # of the model: zero

    def lines(self) -> list[str]:
        """The report to print: the counts first, then parts with the number of their arrays."""
        count = f"loaded {len(self.loaded)} arrays of the tokenizer, skipped {len(self.skipped)}"
        rest = f"{len(self.fresh)} of the model's start anew, {len(self.silent)} as zero"
        parts = {"loaded": self.loaded, "skipped": self.skipped, "anew": self.fresh}
        parts["zero"] = self.silent
        return [
            f"{count}; {rest}",
            *(f"  {word} {_parts(names)}" for word, names in parts.items() if names),
        ]


def _parts(names: list[str]) -> str:
    counts: dict[str, int] = {}
    for name in names:
        part = "/".join(name.split("/")[:2])
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({n})" for part, n in counts.items())


def load(
    model: VQVAE4D, arrays: Mapping[str, np.ndarray], arguments: Mapping[str, Any]
) -> tuple[VQVAE4D, Report]:
    """The model with the weights of a tokenizer's decoder, and what was taken.

    Parameters keep their type and their place on the mesh.

    Args:
      arrays: the tokenizer's, by name.
      arguments: its constructor's; `num_heads` is used.

    Raises ValueError for a decoder of other sizes, or one whose blocks know places.
    """
    sources: dict[str, list[str]] = {}
    for name in sorted(arrays, key=_natural):
        for pattern, place in PLACES:
            if re.fullmatch(pattern, name):
                sources.setdefault(re.sub(pattern, place, name), []).append(name)
    if not sources:
        raise ValueError("the tokenizer has no decoder of UniTok's kind to start from")
    if "decoder/pos_embed" in arrays:
        raise ValueError("the tokenizer's decoder has learned positions, which this one has not")
    heads = model.static.blocks.attn.num_heads
    if (found := arguments.get("num_heads")) != heads:
        raise ValueError(f"the tokenizer's decoder has {found} heads, and the model {heads}")
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    ours = nn.named_arrays(params)
    for name in sorted({name for name in ours if name.startswith(TAKEN)} | set(sources)):
        group = [arrays[source] for source in sources.get(name, [])]
        if name not in ours or not group:
            owner = "model" if name in ours else "tokenizer's decoder"
            raise ValueError(f"only the {owner} has {name.removeprefix('static/')}")
        shape = (len(group), *group[0].shape) if _stacked(name) else group[0].shape
        if shape != ours[name].shape:
            raise ValueError(
                f"{name.removeprefix('static/')} is {shape} in the tokenizer's decoder, and "
                f"{ours[name].shape} in the model"
            )

    def filled(name: str, leaf: jax.Array) -> jax.Array:
        if name in SILENT:
            return jnp.zeros_like(leaf)
        if name not in sources:
            return leaf
        group = [arrays[source] for source in sources[name]]
        array = (np.stack(group) if _stacked(name) else group[0]).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: array[index])

    loaded = [source for group in sources.values() for source in group]
    report = Report(
        loaded=loaded,
        skipped=[name for name in arrays if name not in set(loaded)],
        fresh=[name for name in ours if name not in sources and name not in SILENT],
        silent=[name for name in ours if name in SILENT],
    )
    leaves = [filled(name, leaf) for name, leaf in ours.items()]
    params = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return nnx.merge(graphdef, params, rest), report


def _stacked(name: str) -> bool:
    return name.startswith("static/blocks/")


def _natural(name: str) -> list[int | str]:
    """Block 10 comes after block 9."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]
