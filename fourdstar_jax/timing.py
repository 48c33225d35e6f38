"""The protocol by which benchmarks time calls, and facts about the machine and a program.

`time_calls` and all imports above need the standard library only: `tokenizer/bench_original.py`
runs them by this file's path, under a Python that may have no JAX.
"""

import datetime
import importlib.metadata
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Times of one call, in milliseconds."""

    waited: list[float]  # with a wait for the results after each call
    rounds: list[float]  # means over calls with one wait after the last, of each round

    @property
    def sync_ms(self) -> float:
        return statistics.median(self.waited)

    @property
    def back_to_back_ms(self) -> float:
        return statistics.median(self.rounds)


def time_calls(
    call: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    warm_up: int,
    repeats: int,
    rounds: int = 1,
) -> Times:
    """Times `call` after `warm_up` calls: `repeats` of them one by one, and as many in each round.

    `wait(result)` returns when a result, and with it all that was begun before, is there.
    """
    for _ in range(warm_up):
        wait(call())
    waited, means = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(call())
        waited.append(1e3 * (time.perf_counter() - start))
    for _ in range(rounds):
        start, result = time.perf_counter(), None
        for _ in range(repeats):
            result = call()
        wait(result)
        means.append(1e3 * (time.perf_counter() - start) / repeats)
    return Times(waited, means)


def program_bytes(compiled: Any) -> int | None:
    """Arguments, outputs and temporaries of a compiled program; None where XLA does not tell."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def count_flops(function: Callable[..., Any], *args: Any) -> int:
    """Multiplications and additions of all matrix products and convolutions of a call.

    Counted in the traced program: a scan's body as often as it runs, the body of another loop once,
    the dearest branch of a condition; kernels are left out, but for the fused attention. `args` may
    be shapes.
    """
    import jax

    return _flops(jax.make_jaxpr(function)(*args).jaxpr)


def _flops(jaxpr: Any) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        shapes = [v.aval.shape for v in eqn.invars if hasattr(v.aval, "shape")]
        if name == "dot_general":
            inner = math.prod(shapes[0][i] for i in params["dimension_numbers"][0][0])
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            outputs = shapes[1][params["dimension_numbers"].rhs_spec[0]]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) // outputs
        elif name.startswith("dot_product_attention_fwd"):  # cuDNN's; [b, L, H, E] and [b, S, H, E]
            total += 4 * math.prod(shapes[0]) * shapes[1][1]
        elif name == "scan":
            total += params["length"] * _flops(params["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(_flops(branch.jaxpr) for branch in params["branches"])
        elif name != "pallas_call":
            inside = [x for value in params.values() for x in _as_tuple(value)]
            inside = [getattr(x, "jaxpr", x) for x in inside]  # closed ones
            total += sum(_flops(x) for x in inside if hasattr(x, "eqns"))
    return total


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def allocator_peak() -> int | None:
    """The largest number of bytes the default device's allocator has held, where it tells."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def of_generation(start: float) -> dict[str, Any]:
    """What a manifest tells of making an object since `start` of `time.perf_counter`.

    Seconds, with what was compiled and loaded in them, and where the device tells it the largest
    number of bytes that its allocator held so far in this process.
    """
    import jax

    seconds, peak = time.perf_counter() - start, allocator_peak()
    memory = {} if peak is None else {"peak_memory_bytes": peak}
    return {"seconds": seconds, **memory, "device": jax.devices()[0].device_kind}


def describe(commit: str | None = None) -> dict[str, Any]:
    """Machine, versions and commit, for the head of a results file."""
    import jax

    device = jax.devices()[0]
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    return dict(
        date=datetime.date.today().isoformat(),
        device=device.device_kind,
        platform=device.platform,
        driver=_driver() if device.platform == "gpu" else None,
        versions=dict(python=platform.python_version(), **versions),
        commit=commit or _commit(),
    )


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True).stdout.split()
    return lines[0] if lines else None


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    if shutil.which("git") is None or not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
