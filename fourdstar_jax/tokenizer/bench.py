"""Times a tokenizer's `encode` and `decode`, if wanted beside the original UniTok in PyTorch.

    fourdstar bench tokenizer --against UNITOK --json results.json

Random weights by default, at the size of the released UniTok (arXiv:2502.20321), bfloat16, 64
images of 256x256. The original (`bench_original.py`) runs in a process of its own before ours
touches the device, by the same protocol, `bench_original.measure`. Our weights are cast once by
`nn.cast_weights`. The program takes a flat list of arrays: to flatten a module of a thousand
parameters at every call would cost milliseconds of Python.

- program_bytes: arguments, outputs and temporaries of the program, as compiled.
- allocator_peak_bytes: the device allocator's peak so far, where the device tells it.
- tflops: a second, by the original's count of operations (`TFLOP`), whatever we spend.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fourdstar_jax import nn, sharding
from fourdstar_jax.nn import cast_weights
from fourdstar_jax.timing import allocator_peak, describe, program_bytes
from fourdstar_jax.tokenizer import UNITOK, bench_original
from fourdstar_jax.tokenizer.unitok import UniTok

# Arguments of `UniTok`.
SIZES: dict[str, dict[str, Any]] = {
    "released": UNITOK,
    "tiny": dict(
        resolution=32,
        stem="hybrid",
        stem_channels=(8, 8, 16),
        stem_depths=(1, 1),
        dim=32,
        num_blocks=1,
        num_decoder_blocks=1,
        num_heads=2,
        hidden_dim=32,
        tail="hybrid",
        tail_channels=(16, 16, 8),
        tail_depths=(1, 1),
        learned_positions=False,
        num_codebooks=2,
        vocab_size=16,
        code_dim=8,
    ),
}
OPERATIONS = ("encode", "decode")
# Of one image at the released size, in units of 1e12, two for a multiplication and an addition,
# counted over the layers of the original. Ours needs fewer for `decode`: see
# `nn.conv.upsampled_conv`.
TFLOP = {"encode": 0.1997, "decode": 0.517}


def shapes(size: str, dtype: str) -> UniTok:
    """A UniTok of shapes instead of arrays. Needs a current mesh."""
    arguments = SIZES[size] | dict(dtype=jnp.dtype(dtype))
    return jax.eval_shape(lambda key: nn.build(UniTok, key, **arguments), jax.random.key(0))


def random_model(size: str, dtype: str, seed: int = 0) -> UniTok:
    """A UniTok with `nn.host_weights`. Needs a current mesh."""
    return nn.host_weights(shapes(size, dtype), seed)


class Program(NamedTuple):
    """A compiled function of a flat list of arrays, and that list."""

    compiled: Any
    arrays: list[Any]

    def __call__(self) -> Any:
        return self.compiled(self.arrays)


def compile_flat(function: Callable[..., Any], *args: Any) -> Program:
    """`function(*args)`, to be called without arguments."""
    arrays, structure = jax.tree.flatten(args)
    program = jax.jit(lambda arrays: function(*jax.tree.unflatten(structure, arrays)))
    return Program(program.lower(arrays).compile(), arrays)


def operation(name: str, model: Any, batch: int) -> Program:
    """One of `OPERATIONS`, compiled, with its random images or tokens on the device."""
    rng = np.random.default_rng(1)
    if name == "encode":
        shape = (batch, model.resolution, model.resolution, 3)
        images = rng.uniform(0, 1, shape).astype(np.float32)
        return compile_flat(lambda model, x: model.encode(x), model, jnp.asarray(images))
    num_codebooks, vocab_size, _ = model.codebooks().shape
    tokens = rng.integers(0, vocab_size, (batch, model.num_tokens, num_codebooks), np.int32)
    return compile_flat(lambda model, x: model.decode(x), model, jnp.asarray(tokens))


def measure(name: str, model: Any, *, batch: int, repeats: int) -> dict[str, Any]:
    start = time.perf_counter()
    program = operation(name, model, batch)
    compile_s = time.perf_counter() - start
    line = bench_original.measure(program, jax.block_until_ready, repeats=repeats, batch=batch)
    line["program_bytes"] = program_bytes(program.compiled)
    line["allocator_peak_bytes"] = allocator_peak()
    line["compile_s"] = compile_s
    return line


def measure_original(
    checkout: Path,
    *,
    python: Path | None,
    batch: int,
    dtype: str,
    repeats: int,
    layouts: Sequence[str] | None,
) -> dict[str, Any]:
    """What `bench_original.py` prints. Raises ValueError with its last line if it fails."""
    script = Path(bench_original.__file__)
    command = [str(python or sys.executable), str(script), str(checkout), "--dtype", dtype]
    command += ["--batch", str(batch), "--repeats", str(repeats)]
    command += ["--layouts", *(layouts or bench_original.LAYOUTS)]
    # Its progress goes to our stderr as it comes, and stays there if it fails.
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if child.returncode != 0:
        raise ValueError(f"the original cannot run here: exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def _check(batch, repeats, against, python, layouts, size, load) -> None:
    if batch < 1:
        raise ValueError(f"{batch=} must be positive")
    if repeats < 1:
        raise ValueError(f"{repeats=} must be positive")
    if against is None:
        return
    if load is None and size != "released":
        raise ValueError(f"the original has one size, the released: not {size=}")
    if not (against / "models" / "unitok.py").is_file():
        raise ValueError(f"{against} is no checkout of UniTok: it lacks models/unitok.py")
    if python is not None and shutil.which(python) is None:
        raise ValueError(f"{python} is not a program")
    if unknown := set(layouts or ()) - set(bench_original.LAYOUTS):
        raise ValueError(f"layouts {sorted(unknown)} must be of {bench_original.LAYOUTS}")


def run(
    *,
    size: str = "released",
    load: Callable[[], Any] | None = None,
    batch: int = 64,
    dtype: str = "bfloat16",
    repeats: int = 20,
    against: Path | None = None,
    python: Path | None = None,
    layouts: Sequence[str] | None = None,
    json_file: Path | None = None,
    commit: str | None = None,
) -> dict[str, Any]:
    """Measures both directions, prints a table, and writes the results so far after each.

    `load` gives a tokenizer to time instead of a random one of `size` and `dtype`.
    """
    _check(batch, repeats, against, python, layouts, size, load)
    # Leaves the device's memory to the other process; heeded where JAX has not started yet.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    original = None
    if against is not None:  # before anything of ours is on the device
        original = measure_original(
            against, python=python, batch=batch, dtype=dtype, repeats=repeats, layouts=layouts
        )
    results: dict[str, Any] = describe(commit)
    results["versions"]["flax"] = importlib.metadata.version("flax")
    results |= dict(batch=batch, repeats=repeats, tflop_per_image=None, ours={})
    if original is not None:
        results["versions"] |= original.pop("versions")
        results["original"] = original

    def save():
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(results, indent=1) + "\n")

    save()
    with sharding.use_mesh(devices=jax.devices()[:1]):
        if load is None:
            model = random_model(size, dtype)
            results |= dict(weights="random", size=size, dtype=dtype)
        else:
            model = load()
            widths = jax.tree.map(jnp.shape, jax.tree.leaves(model))
            released = jax.tree.map(jnp.shape, jax.tree.leaves(shapes("released", "bfloat16")))
            size = "released" if widths == released else "other"
            results |= dict(weights="bundle", size=size, dtype=None)
        if size == "released":
            results["tflop_per_image"] = TFLOP
        model = cast_weights(model)
        print(
            f"{results['device']}, {batch} images, {results['weights']} weights of {size} size"
            + (f", {dtype}" if load is None else "")
        )
        print("operation           images/s  back to back ms     sync ms  TFLOP/s*  memory GB")
        for name in OPERATIONS:
            if original is not None:
                _say(name, "original", original[name], results["tflop_per_image"])
            line = measure(name, model, batch=batch, repeats=repeats)
            if original is not None:
                other = original[name]
                line["ratios"] = dict(
                    images_per_s=line["images_per_s"] / other["images_per_s"],
                    sync=other["sync_ms"] / line["sync_ms"],
                )
            results["ours"][name] = line
            _say(name, "ours", line, results["tflop_per_image"])
            save()
    print("* by the count of the original's operations, of which decode here needs fewer")
    return results


def _say(name: str, who: str, line: dict[str, Any], tflop: dict[str, float] | None) -> None:
    words = f"{name:8s}{who:9s}{line['images_per_s']:11,.1f}{line['back_to_back_ms']:17.3f}"
    words += f"{line['sync_ms']:12.3f}"
    if tflop is not None:
        line["tflops"] = tflop[name] * line["images_per_s"]
    words += f"{line['tflops']:10.1f}" if "tflops" in line else f"{'-':>10s}"
    peak = line.get("peak_bytes") or line.get("allocator_peak_bytes") or line.get("program_bytes")
    words += f"{peak / 1e9:11.2f}" if peak else f"{'-':>11s}"
    if "ratios" in line:
        words += f"  {line['ratios']['images_per_s']:.2f}x the original"
    print(words, flush=True)
