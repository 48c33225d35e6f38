"""The best weights of a run so far, by a metric of its log, as a bundle beside its checkpoints."""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax

from fourdstar_jax import bundle, outside
from fourdstar_jax.train.state import TrainState


class Best:
    """Keeps the bundle `<workdir>/best` of the weights with the best value of `metric`.

    `write(folder, state, best=...)` makes a bundle, with `best` in what it tells of its stage
    `star`; every process calls it. A run that is continued knows the value from there; one that
    starts at step 0 begins anew.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        metric: str,
        write: Callable[..., None],
        *,
        higher: bool,
        first_step: int,
    ):
        self.folder = Path(workdir) / "best"
        self.metric, self.write, self.sign = metric, write, 1 if higher else -1
        self.value: float | None = None
        if first_step == 0 and jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        if first_step > 0 and self.folder.is_dir():
            kept = self._kept()
            if kept.text("metric") == metric:
                self.value = kept.number("value", -math.inf, math.inf)

    def offer(self, step: int, measured: Mapping[str, float], state: TrainState) -> None:
        """Takes the weights of `state` if what was measured, by name, has a better value."""
        value = measured.get(self.metric)
        if value is None or not math.isfinite(value):
            return
        if self.value is not None and self.sign * value <= self.sign * self.value:
            return
        self.value = value
        aside = self.folder.with_name("best.partial")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        self.write(aside, state, best={"metric": self.metric, "value": value, "step": step})
        if jax.process_index() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            aside.rename(self.folder)
            print(f"best  {step:>7}  {self.metric} {value:.4g}", file=sys.stderr, flush=True)

    def copy(self, target: Path, stages: Sequence[str]) -> str:
        """Makes bundle `target` of the best weights; says in words which these are."""
        bundle.copy(self.folder, target, stages=stages)
        kept = self._kept()
        step, value = kept.integer("step", 1, 1 << 62), kept.number("value", -math.inf, math.inf)
        return f"the weights of step {step}, best by {self.metric} ({value:.4g})"

    def _kept(self) -> outside.Fields:
        return bundle.read(self.folder).info("star").part("best")
