"""What a step of STAR computes, and what a device could: for tokens a second, TFLOP/s and MFU.

Counted are the multiplications and additions of matrix products, 2 x (weights of a matrix) x (rows
that go through it), and of attention, 4 x width x (pairs of slots that see one another), so that
the causal half of a group counts as a half. Of the container, and of what stands in its place, the
matrices and attention are counted, not clustering and merging; nor norms, softmaxes, the optimizer,
and what the backward pass makes again.
A training step counts 3 times its forward pass.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from fourdstar_jax.star.container import Container
from fourdstar_jax.star.model import STAR

# Dense bfloat16 peaks of the makers' data sheets, without sparsity; SXM of NVIDIA's.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "TPU v5 lite": 197, "TPU v5": 459}
PEAK_TFLOPS |= {"TPU v6": 918, "TPU v4": 275}


def peak_tflops(device_kind: str) -> float | None:
    """A device's peak, where it is known."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_kind), None)


def objects(batch: Mapping[str, Any]) -> dict[str, float]:
    """Of a batch: its objects."""
    return {"objects": len(batch["times"])}


def of_batches(
    model: STAR, *, groups: int | None, text: int
) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Of a batch: its objects, the tokens that are predicted, and TFLOP of a training step.

    At most `groups` of its timesteps are predicted; None: all.
    """

    @functools.cache
    def of(objects: int, timesteps: int, views: int) -> dict[str, float]:
        predicted = min(groups or timesteps, timesteps)
        dims = dict(objects=objects, timesteps=timesteps, views=views)
        flops = forward_flops(model, groups=predicted, text=text, **dims)
        tokens = (views - 1) * model.grid**2 + model.num_known
        return {
            "objects": objects,
            "tokens": objects * predicted * tokens,
            "tflop": 3 * sum(flops.values()) / 1e12,
        }

    return lambda batch: of(*batch["times"].shape, batch["viewmats"].shape[1])


def weights(module: Any) -> int:
    """Numbers in the matrices of a module's linear layers."""
    leaves = jax.tree_util.tree_leaves_with_path(module)
    return sum(x.size for path, x in leaves if "kernel" in jax.tree_util.keystr(path))


def forward_flops(
    model: STAR, *, objects: int, timesteps: int, views: int, groups: int, text: int
) -> dict[str, int]:
    """Multiplications and additions of a forward pass by part; see the top for what counts.

    `model` may be of shapes. `text` slots come before the video's.
    """
    trunk, head, box = model.trunk, model.head, model.container
    n = model.grid**2
    prefix, tokens = text + timesteps * n, views * n - n + model.num_known
    open_slots = container_slots(model, tokens)
    slots = open_slots + tokens
    width = trunk.layers.num_heads * trunk.layers.head_dim
    pairs = prefix * (prefix + 1) // 2 if trunk.causal_prefix else prefix**2
    pairs += groups * (slots * (prefix + open_slots) + tokens * (tokens + 1) // 2)
    pairs += sum(min(t, model.window) for t in range(timesteps)) * tokens**2
    flops = dict(
        embedding=2 * weights(model.image) * timesteps * (n + tokens)
        + 2 * weights(model.text) * text,
        trunk=2 * weights(trunk.layers) * (prefix + groups * slots),
        attention=4 * width * pairs * trunk.num_layers,
    )
    rows, codes = groups * tokens, 1 if head.parallel else head.num_codebooks
    seen = len(head.layers) * codes * (codes + 1) // 2 * head.output.shape[1]
    flops["head"] = rows * (
        2 * weights(head.input) + 2 * codes * weights(head.layers) + 4 * seen + 2 * head.output.size
    )
    if box is not None:
        merged = box.num_slots if isinstance(box, Container) else tokens
        history, count = timesteps * tokens, 0
        if isinstance(box, Container):
            first, *others = box.blocks
            keys = [first.k, first.v, first.score_up, first.score_down]
            count += 2 * weights(keys) * history + 4 * box.dim * groups * merged * history // 2
            count += 2 * groups * merged * (weights(box.blocks) - weights(keys))
            count += len(others) * 4 * box.dim * groups * merged**2
        else:
            count += 2 * weights(box.score) * history + 2 * weights(box.merge) * groups * merged
        if box.as_tokens:
            count += 2 * groups * merged * weights(box.mlp)
        if box.by_place:
            count += 2 * groups * tokens * weights(box.aligned)
        flops["container"] = count
    return {name: objects * x for name, x in flops.items()}


def container_slots(model: STAR, tokens: int) -> int:
    """How many slots before those of a group's tokens hold the state."""
    box = model.container
    if box is None or not box.as_tokens:
        return 0
    return box.num_slots if isinstance(box, Container) else tokens
