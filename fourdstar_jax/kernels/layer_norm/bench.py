"""Times `add_layer_norm`'s kernel beside its definition, on rows as UniTok's blocks have them.

    python -m fourdstar_jax.kernels.layer_norm.bench --json results.json

bfloat16, a bias, a residual sum and two norms, forward alone. Every figure is taken after warm-up
calls:

- back_to_back_ms: mean over as many calls as `--repeats` with one wait after the last.
- sync_ms: median time of one call with a wait after each.
- bytes_per_s: by what has to move, each row read twice (x, y) and written twice.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax.kernels.devices import why_no_mosaic_gpu
from fourdstar_jax.kernels.layer_norm import kernel, reference
from fourdstar_jax.timing import describe, time_calls

EPSILONS = (1e-6, 1e-6)
SHAPES = {  # rows, width
    "transformer": (64 * 256, 1024),  # 64 images of 16x16 tokens
    "stem": (64 * 64 * 64, 256),
    "narrow": (64 * 128 * 128, 128),
}


def arguments(rows: int, width: int) -> Any:
    """Random x, y, bias and the norms' (scale, bias), on the device."""
    rng = np.random.default_rng(0)

    def array(*shape, dtype=jnp.float32):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x, y = (array(rows, width, dtype=jnp.bfloat16) for _ in range(2))
    return x, y, array(width), tuple((array(width), array(width)) for _ in EPSILONS)


def by_reference(x, y, bias, pairs):
    """The definition, called as the kernel is."""
    norms = kernel.norms_of(EPSILONS, pairs)
    return reference.add_layer_norm(x, y, norms, bias, jnp.bfloat16)


def measure(function: Any, rows: int, width: int, repeats: int) -> dict[str, Any]:
    """Times and bandwidth of a function on random rows."""
    args = arguments(rows, width)
    run = jax.jit(function)
    times = time_calls(lambda: run(*args), jax.block_until_ready, warm_up=5, repeats=repeats)
    moved = 4 * args[0].nbytes
    return dict(
        back_to_back_ms=times.back_to_back_ms,
        sync_ms=times.sync_ms,
        bytes_per_s=1e3 * moved / times.back_to_back_ms,
    )


def run(*, repeats: int = 50, json_file: Path | None = None) -> dict[str, Any]:
    """Measures, prints a line each, and writes the results."""
    functions = {"reference": by_reference}
    if reason := why_no_mosaic_gpu():
        print(f"the kernel {reason}")
    else:
        functions["kernel"] = functools.partial(kernel.fused, EPSILONS, False)
    lines: list[dict[str, Any]] = []
    for name, (rows, width) in SHAPES.items():
        for who, function in functions.items():
            line = measure(function, rows, width, repeats)
            print(
                f"{name:12s} {rows:8,} x {width:5,} {who:10s} {line['back_to_back_ms']:.4f} ms "
                f"(sync {line['sync_ms']:.4f}), {line['bytes_per_s'] / 1e9:.0f} GB/s",
                flush=True,
            )
            lines.append(dict(shape=name, rows=rows, width=width, who=who) | line)
    results = describe() | dict(repeats=repeats, results=lines)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the fused LayerNorm.")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    run(repeats=parsed.repeats, json_file=parsed.json)


if __name__ == "__main__":
    main()
