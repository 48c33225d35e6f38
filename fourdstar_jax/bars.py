"""Progress on stderr for those who wait: bars of steps, and a clock for what has no steps."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm

TICK_S = 1.0  # from a sign of life to the next on a terminal, which shows the last one only
LOG_S, LOG_SHARE = 2.0, 0.25  # elsewhere; or this share of the wait so far, if that is longer


@contextlib.contextmanager
def steps(total: int, **options: Any) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what is called after each step.

    The first step is left out of times and estimates: it compiles. Until it is done the bar tells
    how long that takes.
    """
    with tqdm(total=total, **options) as bar, _ticking(bar) as stop:

        def step() -> None:
            if bar.n:
                bar.update()
            else:
                stop()
                bar.reset()
                bar.initial = bar.last_print_n = bar.n = 1
                bar.refresh()

        yield step


@contextlib.contextmanager
def waiting(what: str, *, disable: bool = False) -> Iterator[None]:
    """Tells what is done, and for how long, where it takes a second (two in a log) or more."""
    options: dict[str, Any] = dict(bar_format="{desc}: {elapsed}", delay=TICK_S)
    options |= dict(leave=not sys.stderr.isatty(), disable=disable)
    with tqdm(desc=what, **options) as bar, _ticking(bar):
        yield


@contextlib.contextmanager
def _ticking(bar: tqdm) -> Iterator[Callable[[], None]]:
    """Draws a bar from time to time, until what this yields is called."""
    over = threading.Event()

    def tick() -> None:
        terminal, start, pause = bar.fp.isatty(), time.monotonic(), LOG_S
        while not over.wait(TICK_S if terminal else pause):
            bar.update(0)
            pause = max(LOG_S, LOG_SHARE * (time.monotonic() - start))

    thread = threading.Thread(target=tick, daemon=True)

    def stop() -> None:
        over.set()
        if thread.is_alive():
            thread.join()

    if not bar.disable:
        thread.start()
    try:
        yield stop
    finally:
        stop()
