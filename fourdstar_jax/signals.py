"""A signal ends a command within seconds, and what it has begun to write is removed.

The first SIGINT, SIGTERM or SIGHUP is an exception in the main thread, as Ctrl-C always is. But
while that thread compiles or computes outside Python, none arrives there: a second thread, which
the signal wakes whatever the first one does, waits a little and then ends the process itself.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from fourdstar_jax import folders

GRACE_S = 3.0  # for the main thread to come back to Python and clear up
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated", signal.SIGHUP: "hung up"}


_ended = threading.Lock()
_request: "Request | None" = None


class Stopped(KeyboardInterrupt):
    """The signal in the main thread, or what a `Request` leads to."""

    def __init__(self, number: int):
        super().__init__(WORDS[signal.Signals(number)])
        self.number = number


class Request:
    """A first signal that has come while a block runs which answers it: `number`, else None."""

    number: int | None = None
    ready = False  # there is something to save
    seen = False  # by the watching thread


@contextlib.contextmanager
def answered() -> Iterator[Request]:
    """The first signal after `answer` within the block, which is in `ending`, is a request.

    The block looks at it where it can stop, and raises `Stopped(request.number)` then. A signal
    before `answer`, and a second one, end the process as always.
    """
    global _request
    _request = request = Request()
    try:
        yield request
    finally:
        _request = None


def answer() -> None:
    """From now on a signal is answered: there is something to save."""
    if _request is not None:
        _request.ready = True


def requested() -> int | None:
    """The number of the signal that has come within `answered`, if one has."""
    return _request.number if _request is not None else None


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Signals end the process while the block runs: exit codes 130, 143 and 129, one line.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # SIGHUP stays ignored where it is (nohup)
    taken = [n for n in WORDS if n != signal.SIGHUP or signal.getsignal(n) == signal.SIG_DFL]
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.signal(number, _stop) for number in taken}
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    watch = threading.Thread(target=_watch, args=(reading, taken), daemon=True)
    watch.start()
    try:
        yield
    except Stopped as stopped:
        _end(stopped.number)
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)
        watch.join()
        os.close(reading)


def take_back() -> None:
    """Installs Python's handlers anew: `jax.distributed` takes SIGTERM for itself."""
    if threading.current_thread() is threading.main_thread():
        for number in WORDS:
            if callable(handler := signal.getsignal(number)):
                signal.signal(number, handler)


def _stop(number: int, frame: object) -> None:
    if _request is not None and _request.ready and _request.number is None:
        _request.number = number
        word = WORDS[signal.Signals(number)]
        os.write(2, f"fourdstar: {word}: saves, then ends; once more ends at once\n".encode())
        return
    for other in WORDS:  # one is enough: what it leads to is not interrupted
        signal.signal(other, signal.SIG_IGN)
    # where it arrives in a callback of C code, the exception goes no further than to these
    sys.unraisablehook = lambda lost: _lost(lost.exc_value, sys.__unraisablehook__, lost)
    sys.excepthook = lambda *lost: _lost(lost[1], sys.__excepthook__, *lost)
    raise Stopped(number)


def _lost(error: BaseException | None, otherwise: Callable[..., None], *arguments: Any) -> None:
    while error is not None:
        if isinstance(error, Stopped):
            _end(error.number)
        error = error.__cause__ or error.__context__
    otherwise(*arguments)


def _watch(reading: int, taken: list[signal.Signals]) -> None:
    while data := os.read(reading, 1):
        if data[0] not in taken:
            continue
        if _request is not None and _request.ready and not _request.seen:
            _request.seen = True
        else:
            threading.Event().wait(GRACE_S)
            _end(data[0])


def _end(number: int) -> NoReturn:
    """Ends this process and those that it has started; never returns."""
    _ended.acquire()  # by the first of the two threads, which ends the other as well
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    end_of_bar = "\n" if getattr(bars, "_instances", None) else ""
    message = f"{end_of_bar}fourdstar: {WORDS[signal.Signals(number)]}"
    print(message, file=sys.stderr, flush=True)
    for pid in _descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    folders.abandon()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(128 + number)


def _descendants(pid: int) -> list[int]:
    """Children, their children and so on (Linux; elsewhere none are found)."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        waiting += (more := children.get(waiting.pop(), []))
        found += more
    return found
