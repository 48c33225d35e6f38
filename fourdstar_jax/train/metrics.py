"""Progress on the terminal, metrics as JSON lines and TensorBoard events."""

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np


class MetricWriter:
    """Writes scalars of a step to `<workdir>/metrics.jsonl`, TensorBoard, and one terminal line.

    The line shows the step, the losses, steps a second and the remaining time. Only process 0
    writes.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, total_steps: int, first_step: int = 0):
        self._active = jax.process_index() == 0
        self._total, self._last_step = total_steps, first_step
        self._last_time = time.perf_counter()
        self._waited = 0.0
        self._workdir, self._events = Path(workdir), None
        if self._active:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._jsonl = (self._workdir / "metrics.jsonl").open("a")

    def write(self, step: int, metrics: dict, *, prefix: str = "train") -> dict[str, float]:
        """Records metrics (scalars on device or host); returns them as floats.

        Raises FloatingPointError, with the step, when one called `loss` is not finite.
        """
        values = {k: float(np.asarray(v)) for k, v in metrics.items()}
        now = time.perf_counter()
        if prefix == "train":
            speed = (step - self._last_step) / max(now - self._last_time, 1e-9)
            values["steps_per_s"] = speed
            values["data_wait"] = self._waited / max(now - self._last_time, 1e-9)
            self._last_step, self._last_time, self._waited = step, now, 0.0
        if self._active:
            record = {"step": step, **{f"{prefix}/{k}": v for k, v in values.items()}}
            self._jsonl.write(json.dumps(record) + "\n")
            self._jsonl.flush()
            if self._events is None:  # one that is never written to cannot be closed at exit
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(self._workdir))
            for name, value in values.items():
                self._events.add_scalar(f"{prefix}/{name}", value, step)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
            line = f"{prefix:5s} {step:>7}/{self._total}  {shown}"
            if prefix == "train":
                left = (self._total - step) / max(values["steps_per_s"], 1e-9)
                line += f"  left {int(left // 60)}:{int(left % 60):02d}"
            print(line, file=sys.stderr, flush=True)
        if "loss" in values and not math.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {step}")
        return values

    def restart_clock(self) -> None:
        """Leaves what happened since the last record (evaluation, saving) out of the speed."""
        self._last_time, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch: `data_wait` is the share of the time that goes there."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def close(self) -> None:
        if self._active:
            self._jsonl.close()
            if self._events is not None:
                self._events.close()


class Watch:
    """Looks at the metrics of every step one step later, when reading them keeps no device waiting.

    A trainer adds each step's, takes their means where it writes, and checks before it saves. Up to
    `limit` steps of a run may have metrics that are not finite: they are named and left out.
    """

    def __init__(self, limit: int = 0):
        self._waiting, self._values, self._mean = None, None, Mean()
        self._limit, self._broken = limit, 0

    def add(self, step: int, clips: np.ndarray, metrics: dict) -> dict[str, float] | None:
        """Checks the step before and returns its metrics, on the host; None for the first.

        `clips` are the numbers of the clips that this step's batch is of.
        """
        values = self.check()
        for value in metrics.values():
            value.copy_to_host_async()
        self._waiting = step, clips, metrics
        return values

    def check(self) -> dict[str, float] | None:
        """The metrics of the last step that was added.

        Raises FloatingPointError, with the step, its clips and the terms, where one is not finite
        and `limit` steps have been so before.
        """
        if self._waiting is None:
            return self._values
        step, clips, metrics = self._waiting
        self._waiting = None
        values = self._values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if wrong:
            first = [name for name in wrong if name not in ("loss", "grad_norm")] or wrong
            terms = ", ".join(f"{name} is {values[name]}" for name in first)
            words = f"step {step}: {terms}; clips {', '.join(str(i) for i in clips)} of the dataset"
            self._broken += 1
            if self._broken > self._limit:
                raise FloatingPointError(words)
            print(f"learnt nothing ({self._broken} of {self._limit}): {words}", file=sys.stderr)
        self._mean.add({name: x for name, x in values.items() if math.isfinite(x)})
        return values

    def mean(self) -> dict[str, float]:
        """The means of all metrics since the last call. Raises as `check` does."""
        self.check()
        result, self._mean = self._mean.result(), Mean()
        return result


class Mean:
    """Running means of metric dicts, kept on the device until they are read.

    A metric that not all dicts have is averaged over those that do.
    """

    def __init__(self):
        self._sums, self._counts = {}, collections.Counter()

    def add(self, metrics: dict) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts.update(metrics.keys())

    def result(self) -> dict[str, float]:
        return {name: float(value) / self._counts[name] for name, value in self._sums.items()}
