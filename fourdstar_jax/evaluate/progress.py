"""How long an evaluation takes, told from its first clips."""

import time
from collections.abc import Callable

Log = Callable[[str], None]
EVERY_S = 60.0  # after the first two estimates


def silent(line: str) -> None:
    """A `Log` of those who do not want one."""


def about(seconds: float) -> str:
    """A time in words."""
    return f"about {seconds / 60:.1f} minutes"


class Progress:
    """Tells after the second and the fifth of `total` parts, then each minute, what is left.

    The first part is not counted: it compiles.
    """

    def __init__(self, total: int, log: Log, what: str = "clips"):
        self._total, self._log, self._what = total, log, what
        self._count, self._first, self._told = 0, 0.0, 0.0

    def step(self) -> None:
        """One more part is done."""
        now = time.perf_counter()
        self._count += 1
        if self._count == 1:
            self._first = self._told = now
            return
        left = self._total - self._count
        if left > 0 and (self._count in (2, 5) or now - self._told > EVERY_S):
            seconds = (now - self._first) / (self._count - 1) * left
            done = f"{self._count} of {self._total} {self._what}"
            self._log(f"{done}, {about(seconds)} to go")
            self._told = now
