"""Rules that turn tensors of a released state dict into ours, and back.

A rule takes some of their tensors and gives some of ours; it can be turned round. All of it works
on numpy arrays, on memory maps too, and on arrays that only have a shape (`numpy.broadcast_to`), so
that the same rules say which shapes a file must hold.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

Arrays = list[np.ndarray]


class Rule(NamedTuple):
    """A way from some of their tensors, by name, to some of ours, and back."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    forward: Callable[[Arrays], Arrays]  # theirs -> ours
    backward: Callable[[Arrays], Arrays]  # ours -> theirs


def same(theirs: str, ours: str) -> Rule:
    """The same array under another name."""
    return Rule((theirs,), (ours,), lambda x: x, lambda x: x)


def linear(theirs: str, ours: str) -> Rule:
    """torch's Linear weight [out, in] to a kernel [in, out]."""
    return Rule((theirs,), (ours,), lambda x: [x[0].T], lambda x: [x[0].T])


def conv(theirs: str, ours: str) -> Rule:
    """torch's Conv2d weight [out, in / groups, h, w] to a kernel [h, w, in / groups, out]."""
    return Rule(
        (theirs,),
        (ours,),
        lambda x: [x[0].transpose(2, 3, 1, 0)],
        lambda x: [x[0].transpose(3, 2, 0, 1)],
    )


def stack(theirs: Sequence[str], ours: str) -> Rule:
    """Several arrays of one shape to one with a leading axis."""
    return Rule(tuple(theirs), (ours,), lambda x: [np.stack(x)], lambda x: list(x[0]))


def split(theirs: str, ours: Sequence[str], sizes: Sequence[int]) -> Rule:
    """torch's fused Linear weight [sum of sizes, in] to kernels [in, size]."""
    edges = np.cumsum(sizes)[:-1].tolist()
    return Rule(
        (theirs,),
        tuple(ours),
        lambda x: [part.T for part in np.split(x[0], edges)],
        lambda x: [np.concatenate([part.T for part in x])],
    )


def zeros_here(ours: str, shape: Sequence[int], dtype: DTypeLike = np.float32) -> Rule:
    """An array of ours that their file does not have, and that starts at zero."""
    return Rule((), (ours,), lambda x: [np.zeros(shape, dtype)], lambda x: [])


def zeros_there(theirs: str, shape: Sequence[int]) -> Rule:
    """An array of theirs that is always zero, and that ours does not have.

    Converting one that is not zero raises ValueError.
    """

    def forward(x: Arrays) -> Arrays:
        if np.any(x[0]):
            raise ValueError(f"{theirs} is not zero, as it is in every file of this kind")
        return []

    return Rule((theirs,), (), forward, lambda x: [np.zeros(shape, np.float32)])


def by_name(shapes: Mapping[str, tuple[int, ...]], rename: Callable[[str], str]) -> list[Rule]:
    """A rule for each of our arrays, from its name alone.

    Args:
      shapes: of our arrays, by name ("encoder/blocks/0/attn/qkv/kernel").
      rename: from the name with dots and torch's last word ("encoder.blocks.0.attn.qkv.weight") to
        theirs. kernel, scale and embedding are torch's weight; kernels are transposed.
    """
    rules = []
    for ours, shape in shapes.items():
        head, _, last = ours.rpartition("/")
        word = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
        theirs = rename(".".join([*head.split("/"), word] if head else [word]))
        if last == "kernel" and len(shape) == 2:
            rules.append(linear(theirs, ours))
        elif last == "kernel" and len(shape) == 4:
            rules.append(conv(theirs, ours))
        else:
            rules.append(same(theirs, ours))
    return rules


def state_dict(tree: object) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name. Raises ValueError for anything else in its place."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"a {type(tree).__name__} where the state dict should be")
    for name, value in tree.items():
        if not isinstance(name, str) or not name.isprintable():
            raise ValueError(f"{name!r} is no name of a tensor")
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name} is no tensor")
    return dict(tree)


def their_shapes(
    rules: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shapes that a state dict of theirs must have to become arrays of ours of `shapes`."""
    nothing = np.zeros((), np.float32)
    found = {}
    for rule in rules:
        theirs = rule.backward([np.broadcast_to(nothing, shapes[name]) for name in rule.ours])
        found |= {n: x.shape for n, x in zip(rule.theirs, theirs, strict=True)}
    return found


def check(
    state: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[int, ...]], ignored: Sequence[str]
) -> list[str]:
    """Complaints about the names and shapes of a state dict, a line for each name.

    Args:
      ignored: regular expressions that match whole names of theirs that are not needed.
    """
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    extra = [name for name in state if name not in wanted and not skip.fullmatch(name)]
    lines = [f"missing: {name} {shape}" for name, shape in wanted.items() if name not in state]
    lines += [f"not known: {name} {tuple(state[name].shape)}" for name in extra]
    lines += [
        f"of another shape: {name} is {tuple(state[name].shape)}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    return lines


def forward(rules: Sequence[Rule], state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our arrays of a state dict that `check` found nothing wrong with."""
    out = {}
    for rule in rules:
        out |= zip(rule.ours, rule.forward([state[n] for n in rule.theirs]), strict=True)
    return out


def backward(rules: Sequence[Rule], arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their state dict of our arrays."""
    out = {}
    for rule in rules:
        out |= zip(rule.theirs, rule.backward([arrays[n] for n in rule.ours]), strict=True)
    return out
