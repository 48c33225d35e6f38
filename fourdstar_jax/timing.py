"""The protocol by which benchmarks time calls, and facts about the machine and a program.

`time_calls` and all imports above need the standard library only: `tokenizer/bench_original.py`
runs them by this file's path, under a Python that may have no JAX.
"""

import datetime
import importlib.metadata
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


def allocator_peak() -> int | None:
    """The largest number of bytes the default device's allocator has held, where it tells."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


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
