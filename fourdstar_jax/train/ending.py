"""What ends a training before its last step: a signal, and a step that never comes to its end."""

import faulthandler
import functools
import os
import statistics
import sys
import threading
import time
from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fourdstar_jax import folders, signals

EXIT_HUNG = 70  # a step took many times as long as those before it (EX_SOFTWARE)
FEW_STEPS = 10  # are no measure of how long a step takes: the first ones compile
LEAST_S = 300.0


class Ending:
    """Asked after each step whether it is the last one, and watches that each comes to its end.

    Before the first step is done a signal ends the process at once: there is nothing to save. From
    then on a signal to any process is a signal to all: they agree on it a step later, so that all
    save after the same one. A step that takes `times` as long as the median of those before it, and
    five minutes at least, ends the process with EXIT_HUNG, after the stacks of all its threads.
    `times` 0 watches nothing.
    """

    def __init__(self, mesh: Mesh, *, times: float):
        self._mesh, self._waiting = mesh, None
        self._seconds: deque[float] = deque(maxlen=100)
        self._begun: float | None = None
        if times:
            threading.Thread(target=self._watch, args=(times,), daemon=True).start()

    def begin(self) -> None:
        """Before all that a step needs, its data too."""
        self._begun = time.monotonic()

    def asked(self) -> int:
        """After a step, before evaluation and saving: the signal that all know of, or 0."""
        if self._begun is not None:
            self._seconds.append(time.monotonic() - self._begun)
            self._begun = None
        signals.answer()
        number = signals.requested() or 0
        if jax.process_count() == 1:
            return number
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        mine = np.full(jax.local_device_count(), number, np.int32)
        told = _largest(self._mesh)(jax.make_array_from_process_local_data(sharding, mine))
        told.copy_to_host_async()
        before, self._waiting = self._waiting, told
        return 0 if before is None else int(before)

    def _watch(self, times: float) -> None:
        while True:
            time.sleep(1)
            begun, seconds = self._begun, list(self._seconds)
            if begun is None or len(seconds) < FEW_STEPS:
                continue
            usual, now = statistics.median(seconds), time.monotonic() - begun
            if now > max(LEAST_S, times * usual):
                hung(f"a step has taken {now:.0f} s, where {usual:.3g} s is usual")


def hung(words: str) -> None:
    """Ends this process with the stacks of all its threads."""
    print(f"fourdstar: {words}; its threads are at", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    folders.abandon()
    os._exit(EXIT_HUNG)


@functools.cache
def _largest(mesh: Mesh):
    return jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
