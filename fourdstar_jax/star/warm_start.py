"""Starts STAR from released weights: the layers of a LlamaGen or an MVAR, and their text MLP.

The arrays are those of `convert.llamagen` and `convert.mvar`, by name. STAR's trunk is of the same
blocks (RMSNorm, SwiGLU, no biases), its text MLP reads the same features of T5; all else that these
models have belongs to their own tokens, positions and conditions, and is skipped with the reason.
What it is worth is not known: the report tells how the models differ where the shapes do not.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from fourdstar_jax.star.model import STAR

# What STAR has no place for: regular expression of a whole name, and why.
WITHOUT_PLACE = (
    (r"tok_embeddings/.*", "STAR embeds the codes of its own tokenizer and has no table of tokens"),
    (r"output/.*", "STAR's head is another one, over the codes of its own tokenizer"),
    (r"cls_embedding/uncond_embedding", "a vector for each slot; STAR has one for all of them"),
    (r"cls_embedding/embedding_table/.*", "STAR knows no classes"),
    (r"layers/\d+/ada_linear/.*", "STAR's layers have no AdaLN"),
    (
        # With an OpenCV pose R they are R (x, -y, -1), where a ray is R (x, y, 1); what lies
        # between them depends on R, so that no other kernel gives the same embedding.
        r"cam_patchify/.*",
        "made for rays that point away from the object and are upside down, at another radius, "
        "which no change of the kernel mends; and STAR's has no bias",
    ),
    (r"(condition_layers|image_warp)/.*", "STAR takes a video in the prefix, not a warped image"),
    (r"align_projector/.*", "only for a loss against features of DINO"),
)
LAYER = ("attention_norm/scale", "q/kernel", "k/kernel", "v/kernel", "out/kernel")
LAYER += ("ffn_norm/scale", "ffn/gate/kernel", "ffn/up/kernel", "ffn/down/kernel")
TEXT = ("text/mlp/up/kernel", "text/mlp/down/kernel")


class Report(NamedTuple):
    """What became of the file's arrays and of STAR's parameters, by name."""

    loaded: list[str]  # of the file
    skipped: list[tuple[str, str]]  # of the file, and why
    fresh: list[str]  # of STAR's parameters, which kept their initialisation
    notes: list[str]  # how the models differ where the shapes do not

    def summary(self) -> str:
        """The counts, in a line."""
        return (
            f"loaded {len(self.loaded)} arrays of the file, skipped {len(self.skipped)}; "
            f"{len(self.fresh)} of STAR's start anew"
        )

    def lines(self) -> list[str]:
        """The report to print: the counts first, then names, those of alike layers together."""
        lines = [self.summary()]
        if self.loaded:
            lines.append(f"  loaded {_compact(self.loaded)}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.skipped:
            reasons.setdefault(reason, []).append(name)
        lines += [f"  skipped {_compact(names)}: {why}" for why, names in reasons.items()]
        parts: dict[str, int] = {}
        for name in self.fresh:
            part = name.split("/")[0]
            parts[part] = parts.get(part, 0) + 1
        if parts:
            lines.append("  anew " + ", ".join(f"{part} ({n})" for part, n in parts.items()))
        return lines + [f"  note: {note}" for note in self.notes]


def load(
    model: STAR, arrays: Mapping[str, np.ndarray], arguments: Mapping[str, Any]
) -> tuple[STAR, Report]:
    """A model with all that fits of a file, and what that was.

    The trunk is taken whole or not at all (its layers, heads and every shape must agree), and so is
    the text MLP. Parameters keep their type and their place on the mesh.

    Args:
      arrays: the file's, by name (see `convert.llamagen`).
      arguments: its sizes; `family`, `num_layers`, `num_heads` and `num_kv_heads` are used.

    Raises ValueError if the file lacks an array that its sizes say it has.
    """
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    ours = _by_name(params)
    reasons = misfits(model, arrays, arguments)
    sources = {
        target: group
        for target, group in (_trunk(arguments) | _text(arrays)).items()
        if not set(group) & set(reasons)
    }
    loaded = [name for group in sources.values() for name in group]
    for name in set(arrays) - set(loaded) - set(reasons):
        found = [why for pattern, why in WITHOUT_PLACE if re.fullmatch(pattern, name)]
        reasons[name] = found[0] if found else "STAR has no such array"

    filled = []
    for name, leaf in ours.items():
        if name in sources:
            stacked = name.startswith("trunk/layers/")
            leaf = _place([arrays[x] for x in sources[name]], leaf, stacked=stacked)
        filled.append(leaf)
    report = Report(
        loaded=loaded,
        skipped=[(name, reasons[name]) for name in arrays if name in reasons],
        fresh=[name for name in ours if name not in sources],
        notes=_notes(model, arguments["family"]) if "norm/scale" in loaded else [],
    )
    return nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(params), filled), rest), report


def misfits(
    model: STAR, arrays: Mapping[str, np.ndarray], arguments: Mapping[str, Any]
) -> dict[str, str]:
    """Why arrays of the file that STAR has a place for do not fit it, by name; arguments as `load`.

    Only shapes are read, of the model too.
    """
    trunk, text = _trunk(arguments), _text(arrays)
    if lacking := [n for group in trunk.values() for n in group if n not in arrays]:
        raise ValueError(f"the trunk to start from lacks {lacking[0]}, and {len(lacking)} in all")
    ours = _by_name(nnx.state(model, nnx.Param))
    reasons = _trunk_reasons(model, trunk, arrays, arguments, ours)
    return reasons | _text_reasons(model, text, arrays, ours)


def _trunk(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """STAR's parameters of the trunk, and which of the file's arrays they are made of."""
    number = range(arguments["num_layers"])
    trunk = {f"trunk/layers/{x}": [f"layers/{i}/{x}" for i in number] for x in LAYER}
    return trunk | {"trunk/norm/scale": ["norm/scale"]}


def _text(arrays: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """The same for the text MLP, which models of classes do not have."""
    return {name: [name] for name in TEXT if name in arrays}


def _by_name(params: nnx.State) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {n.removesuffix("/value"): leaf for n, (_, leaf) in zip(names, leaves, strict=True)}


def _trunk_reasons(
    model: STAR,
    trunk: Mapping[str, Sequence[str]],
    arrays: Mapping[str, np.ndarray],
    arguments: Mapping[str, Any],
    ours: Mapping[str, Any],
) -> dict[str, str]:
    """Why the trunk's arrays cannot be taken, by name; nothing if they can."""
    everything = [name for group in trunk.values() for name in group]
    layer = model.trunk.layers
    for word, own in (
        ("num_layers", model.trunk.num_layers),
        ("num_heads", layer.num_heads),
        ("num_kv_heads", layer.num_kv_heads),
    ):
        if own != arguments[word]:
            return dict.fromkeys(everything, f"{word} is {arguments[word]}, and STAR's {own}")
    wrong = {}
    for target, group in trunk.items():
        shape = ours[target].shape[1:] if target.startswith("trunk/layers/") else ours[target].shape
        wrong |= {
            name: f"its shape is {arrays[name].shape}, and STAR's {shape}"
            for name in group
            if arrays[name].shape != shape
        }
    if wrong:
        whole = "other arrays of the trunk do not fit, and it is taken whole"
        return dict.fromkeys(everything, whole) | wrong
    return {}


def _text_reasons(
    model: STAR,
    text: Mapping[str, Sequence[str]],
    arrays: Mapping[str, np.ndarray],
    ours: Mapping[str, Any],
) -> dict[str, str]:
    """Why the text MLP's arrays cannot be taken, by name; nothing if they can."""
    encoder = model.text.encoder
    if encoder != "t5":
        return dict.fromkeys(text, f"for features of T5, and STAR's text_encoder is {encoder!r}")
    wrong = {
        name: f"its shape is {arrays[name].shape}, and STAR's {ours[name].shape}"
        for name in text
        if arrays[name].shape != ours[name].shape
    }
    if wrong:
        return dict.fromkeys(text, "the other half of the MLP does not fit") | wrong
    return {}


def _place(sources: Sequence[np.ndarray], leaf: jax.Array, *, stacked: bool) -> jax.Array:
    """An array that lies over the mesh as `leaf` does; a host only makes its own part."""

    def part(index):
        if not stacked:
            return np.asarray(sources[0][index], leaf.dtype)
        return np.stack([np.asarray(x[index[1:]], leaf.dtype) for x in sources[index[0]]])

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)


def _notes(model: STAR, family: str) -> list[str]:
    """How the model that the trunk is from differs from STAR in what no shape tells."""
    rope = "axial" if model.rotary_dim is not None else "none"
    notes = []
    if family == "llamagen":
        notes.append(
            "LlamaGen's queries and keys are turned by row and column (2D RoPE on interleaved "
            f"pairs) and are zero in its prefix; with rope={rope!r} STAR's are not, and adapt"
        )
    if family == "mvar":
        notes.append("MVAR's layers are modulated by the text (AdaLN), which is left out")
        notes.append("MVAR's text does not attend; STAR's prefix does")
        if rope != "none":
            notes.append(f"MVAR has no RoPE; STAR's is {rope!r}")
    if not model.trunk.causal_prefix:
        notes.append("its prefix was causal: prefix='causal' is nearer to it than 'bidirectional'")
    return notes


def _compact(names: Sequence[str]) -> str:
    """Names without `/kernel` and `/scale`; alike layers together, and crowds as their number."""
    layers: dict[str, list[int]] = {}
    parts: dict[str, list[str]] = {}
    for name in names:
        short = re.sub(r"/(kernel|scale|embedding)$", "", name)
        if found := re.fullmatch(r"layers/(\d+)/(.+)", short):
            layers.setdefault(found[2], []).append(int(found[1]))
        else:
            parts.setdefault(short.split("/")[0], []).append(short)
    ranges: dict[str, list[str]] = {}
    for part, numbers in layers.items():
        ranges.setdefault(_ranges(sorted(numbers)), []).append(part)
    groups = [f"layers {where}: {' '.join(same)}" for where, same in ranges.items()]
    others = [f"{part} ({len(x)})" if len(x) > 3 else " ".join(x) for part, x in parts.items()]
    return "; ".join([*groups, *([" ".join(others)] if others else [])])


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as "0-3,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
