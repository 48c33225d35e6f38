"""What the comparisons with the original PyTorch models share."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

BLOCK_LIMIT, END_TO_END_LIMIT = 1e-5, 5e-5  # relative L2, float32
# A margin between the two nearest codes below this is a tie: rounding decides.
TIE = 1e-5


class Row(NamedTuple):
    """How far a block of ours is from the original's, given the original's input."""

    model: str
    block: str
    relative_l2: float
    limit: float


def relative_l2(ours, theirs) -> float:
    """|ours - theirs| / |theirs|, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"{ours.shape=} is not {theirs.shape=}")
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def picture(rng: np.random.Generator, batch: int, size: int) -> np.ndarray:
    """Waves of a few directions and noise, in [-1, 1], [batch, size, size, 3]."""
    y, x = np.mgrid[:size, :size] / size
    out = 0.15 * rng.normal(size=(batch, size, size, 3))
    for image in out:
        for _ in range(8):
            u, v, phase = rng.normal(0, 6, 2).tolist() + [rng.uniform(0, 2 * np.pi)]
            image += np.sin(u * x + v * y + phase)[..., None] * rng.normal(0, 0.3, 3)
    return np.clip(out, -1, 1).astype(np.float32)


def load(kind: str, source: Path, **changes: Any) -> Any:
    """Our model with an original's weights, by way of the package's conversion."""
    import jax
    import jax.numpy as jnp

    from fourdstar_jax import bundle, nn
    from fourdstar_jax.convert import command, rules

    names = command.key_map(kind)
    state = names.find(command.read(source))
    model = bundle.shapes(command.KINDS[kind], {**names.arguments(state), **changes})
    targets = nn.named_arrays(model)
    shapes = {name: x.shape for name, x in targets.items()}
    table = names.rules_for(shapes)
    if wrong := rules.check(state, rules.their_shapes(table, shapes), names.IGNORED):
        raise ValueError("\n".join(wrong))
    arrays = rules.forward(table, state)
    leaves = [jnp.asarray(arrays[name], x.dtype) for name, x in targets.items()]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def print_rows(rows: list[Row]) -> int:
    """Prints them; returns how many are above their limits."""
    for row in rows:
        mark = "" if row.relative_l2 <= row.limit else "  ABOVE ITS LIMIT"
        print(f"{row.block:40} {row.relative_l2:.1e}  (limit {row.limit:.0e}){mark}")
    return sum(not row.relative_l2 <= row.limit for row in rows)
