"""Progress on the terminal, metrics as JSON lines and TensorBoard events."""

import collections
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourdstar_jax.timing import allocator_peak
from fourdstar_jax.train.work import peak_tflops

UNSHOWN = ("objects_per_s", "tflops", "memory_gb", "goodput")  # in the log, not in the line


class MetricWriter:
    """Writes scalars of a step to `<workdir>/metrics.jsonl`, TensorBoard, and one terminal line.

    The line shows the step, the losses, steps a second and the remaining time. Only process 0
    writes. With `config`, a trainer's, also to Weights & Biases where `config.wandb` names a
    project, and a trace of the steps `config.profile`, "FIRST:LAST", goes to `<workdir>/profile`.

    Beside the losses of training stand, of the time since the last line:

    - data_wait: the share that went into waiting for batches;
    - objects_per_s, and of STAR, for each device: tokens_per_s, those that are predicted; tflops
      and mfu, their share of the device's peak, where `train.work` knows it and says what counts;
    - memory_gb: the most that the first device has held;
    - goodput: the share of the time since the run first began, stops, restarts, compiling,
      evaluation and saving included, that went into steps which were kept.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        first_step: int = 0,
        config: Any = None,
        work: Callable[[dict[str, Any]], dict[str, float]] | None = None,
    ):
        self._active = jax.process_index() == 0
        self._total, self._last_step = total_steps, first_step
        self._last_time = time.perf_counter()
        self._waited, self._first, self._stepped, self._lost = 0.0, first_step, first_step, 0.0
        self._work, self._done = work, collections.Counter()
        self._workdir, self._events, self._wandb = Path(workdir), None, None
        self._profile = None if config is None else profiled(config.profile)
        if self._active:
            self._workdir.mkdir(parents=True, exist_ok=True)
            path = self._workdir / "metrics.jsonl"
            self._began, self._kept_s = since(path, first_step)
            self._jsonl = path.open("a")
            if config is not None and config.wandb is not None:
                self._wandb = open_wandb(config, self._workdir)
            print(beginning(first_step, total_steps), file=sys.stderr, flush=True)

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
            values |= self._speeds(max(now - self._last_time, 1e-9))
            self._last_step, self._last_time, self._waited = step, now, 0.0
            self._done.clear()
        if self._active:
            record = {"step": step, **{f"{prefix}/{k}": v for k, v in values.items()}}
            if self._wandb is not None:
                self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=step)
            if prefix == "train":
                clock = {"time": time.time(), "kept_s": self._kept_s}
                record |= {f"train/{name}": round(value, 3) for name, value in clock.items()}
            self._jsonl.write(json.dumps(record) + "\n")
            self._jsonl.flush()
            if self._events is None:  # one that is never written to cannot be closed at exit
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(self._workdir))
            for name, value in values.items():
                self._events.add_scalar(f"{prefix}/{name}", value, step)
            shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k not in UNSHOWN)
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
        """Around the wait for a step's batch: `data_wait` is the share of the time it takes.

        Raises ValueError where a process that reads (`config.data.workers`) was killed.
        """
        self._stepped += 1
        if self._stepped == self._first + 2 and self._last_step == self._first:
            self._lost = time.perf_counter() - self._last_time  # the first step compiles
        if self._profile is not None and self._active:
            self._profile(self._stepped, self._workdir / "profile")
        start = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            if "Worker process" not in str(error):  # as grain says it
                raise
            raise ValueError(
                f"a process that reads the data is gone ({str(error).split('. ')[0]}), for lack of "
                "memory perhaps (config.data.workers, config.data.cache_bytes): the run goes on "
                "from its last checkpoint when it is started again"
            ) from error
        self._waited += time.perf_counter() - start

    def count(self, batch: dict[str, Any]) -> None:
        """Takes a step's batch into what is told of speeds."""
        if self._work is not None:
            self._done.update(self._work(batch))

    def _speeds(self, seconds: float) -> dict[str, float]:
        found, devices = {}, jax.device_count()
        if self._done:
            found["objects_per_s"] = self._done["objects"] / seconds
        if self._done["tokens"]:
            found["tokens_per_s"] = self._done["tokens"] / seconds / devices
            found["tflops"] = self._done["tflop"] / seconds / devices
            if peak := peak_tflops(jax.devices()[0].device_kind):
                found["mfu"] = found["tflops"] / peak
        if self._active:
            if (held := allocator_peak()) is not None:
                found["memory_gb"] = held / 1e9
            self._kept_s, self._lost = self._kept_s + seconds - self._lost, 0.0
            found["goodput"] = min(self._kept_s / max(time.time() - self._began, 1e-9), 1.0)
        return found

    def close(self) -> None:
        if self._active:
            self._jsonl.close()
            if self._wandb is not None:
                self._wandb.finish()
            if self._events is not None:
                self._events.close()


def beginning(first_step: int, total_steps: int) -> str:
    """What a run is about to do, in a line: a minute may pass before its first metrics."""
    if first_step >= total_steps:
        return f"the run is at step {first_step} of {total_steps}: nothing is left to train"
    start = f"goes on after step {first_step}" if first_step else "begins"
    return f"the run {start}, to step {total_steps}; its first step is compiled"


def since(path: Path, first_step: int) -> tuple[float, float]:
    """When the run of a log began, by the clock, and how many seconds of its steps were kept.

    Steps after `first_step`, from which the run goes on, were not.
    """
    began, kept_s = time.time(), 0.0
    for line in path.read_text().splitlines() if path.is_file() and first_step else ():
        with contextlib.suppress(json.JSONDecodeError):  # of a run that was killed while it wrote
            row = json.loads(line)
            if "train/kept_s" in row and row["step"] <= first_step:
                kept_s = row["train/kept_s"]
                began = min(began, row["train/time"] - kept_s)
    return began, kept_s


def profiled(steps: str | None) -> Callable[[int, Path], None] | None:
    """What is called before each step, with a folder, and traces those of "FIRST:LAST".

    Raises ValueError for what names no steps.
    """
    if steps is None:
        return None
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise ValueError(f"--profile {steps}: FIRST:LAST, two numbers of steps such as 10:13")

    def before(step: int, folder: Path) -> None:
        if step == int(first):
            jax.profiler.start_trace(folder)
        elif step == int(last) + 1:
            jax.block_until_ready([x for x in jax.live_arrays() if not x.is_deleted()])
            jax.profiler.stop_trace()
            print(f"a trace of steps {steps} is in {folder}", file=sys.stderr, flush=True)

    return before


def open_wandb(config: Any, workdir: Path) -> Any:
    """The run of a folder at Weights & Biases, begun or gone on with.

    Raises ValueError where the package is missing or the run cannot be opened.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError("config.wandb needs wandb: pip install 'fourdstar-jax[wandb]'") from error
    name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    try:
        return wandb.init(
            project=config.wandb, id=name, resume="allow", dir=str(workdir), config=config.to_dict()
        )
    except (wandb.Error, OSError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"config.wandb={config.wandb!r}: {line}") from error


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
