"""Assets to finished folders: a process each, with limits, and none of them twice.

A work folder is what all shards share, and what a later run goes on from:

    settings.json            what the assets are rendered for; another run's must be the same
    done/ab/abcd.../         of an asset: result.json and its records; there whole or not at all
    claims/                  which process is at which asset (`shards.Claims`)
    partial/                 what is being written
"""

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, NamedTuple

from fourdstar_jax import folders, outside, remote
from fourdstar_jax.data import blender, splits
from fourdstar_jax.data.assets import Job, quarantined, render_asset, renderer_of
from fourdstar_jax.data.settings import Limits, Settings
from fourdstar_jax.shards import Claims

SLACK_S = 60.0  # that another machine's clock may be wrong, and for clearing up
RESULT = "result.json"
ATTEMPTS = 2  # of an asset whose process is killed: it may be the machine's fault


class Work:
    """A work folder, and others that it goes on from, which are only read.

    Raises ValueError for one that was begun with other settings.
    """

    def __init__(
        self, folder: Path, settings: Settings, limits: Limits, others: Sequence[Path] = ()
    ):
        self.folder, self.settings, self.limits = folder, settings, limits
        self._all = (folder, *others)
        begun = {"schema": 1, "settings": settings._asdict(), "split_sha256": splits.SHA256}
        begun = json.loads(json.dumps(begun))
        if (url := remote.url_of(folder)) is not None:
            raise ValueError(f"--work {url} must be a folder: an object store knows no renaming")
        path = folder / folders.WORK.manifest
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"{folder} holds other things: give --work a folder of its own")
            folders.replace_file(path, (json.dumps(begun, indent=1) + "\n").encode())
        for place in self._all:
            found = outside.read(place / folders.WORK.manifest)
            for name, value in begun["settings"].items():
                if (there := found.part("settings").values.get(name)) != value:
                    raise ValueError(f"{place} was begun with {name}={there}, not {value}")
            if found.text("split_sha256") != begun["split_sha256"]:
                raise ValueError(f"{place} was begun with another split than {splits.CURRENT}")
        # killed processes are tried again, so an asset may take its time more than once
        self.claims = Claims(folder / "claims", ATTEMPTS * limits.seconds + SLACK_S)

    def place(self, file: str) -> Path:
        """Where the asset's folder is, or else will be."""
        key = _key(file)
        places = [folder / "done" / key[:2] / key for folder in self._all]
        return next((place for place in places if (place / RESULT).is_file()), places[0])

    def done(self, file: str) -> bool:
        """Whether the asset is there, or quarantined."""
        return (self.place(file) / RESULT).is_file()

    def result(self, file: str) -> dict[str, Any]:
        """What was said of an asset that is done; each of its clips has the path of its record."""
        path = self.place(file) / RESULT
        found = outside.read(path)
        for clip in found.parts("clips"):
            clip.text("record", pattern=r"[0-9]+-[0-9]+\.npz")
        result = {name: list(found.values[name]) for name in quarantined("", "")}
        result["clips"] = [c | {"record": str(path.parent / c["record"])} for c in result["clips"]]
        return result | {"seconds": found.number("seconds", 0, 1e9)}

    def forget_quarantined(self, file: str) -> None:
        """An asset that is quarantined in the first folder will be tried again."""
        place = self.place(file)
        if self.folder in place.parents and self.done(file) and self.result(file)["quarantined"]:
            shutil.rmtree(place)

    def take(self, file: str) -> bool:
        """Whether the asset is to be done, and this process's to do."""
        if self.done(file) or not self.claims.take(_key(file)):
            return False
        if self.done(file):  # between the two
            self.release(file)
            return False
        return True

    def release(self, file: str) -> None:
        """Ends the claim of an asset."""
        self.claims.release(_key(file))

    def partial(self, file: str, pid: int) -> Path:
        """Where a process of this machine writes an asset's folder."""
        return self.folder / "partial" / f"{_key(file)}.{os.uname().nodename}.{pid}"

    def write(self, job: Job) -> None:
        """Renders an asset in this process. Raises OSError where the folder cannot be written."""
        start = time.perf_counter()
        with self._writing(job.file) as folder:
            result = render_asset(job, folder)
            result |= {"seconds": round(time.perf_counter() - start, 3)}
            (folder / RESULT).write_text(json.dumps(result) + "\n")

    def quarantine(self, file: str, reason: str, seconds: float) -> None:
        """Says for ever, or until it is forgotten, why there is nothing of an asset."""
        with self._writing(file) as folder:
            result = quarantined(file, reason) | {"seconds": round(seconds, 3)}
            (folder / RESULT).write_text(json.dumps(result) + "\n")

    @contextlib.contextmanager
    def _writing(self, file: str) -> Iterator[Path]:
        partial = self.partial(file, os.getpid())
        partial.mkdir(parents=True)
        try:
            yield partial
            place = self.place(file)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.rename(place)
            except OSError:  # another process was faster: one is as good as the other
                if not self.done(file):
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _key(file: str) -> str:
    return hashlib.sha256(file.encode()).hexdigest()[:40]


class _Running(NamedTuple):
    process: Any
    job: Job
    attempt: int
    begun: float
    said: multiprocessing.connection.Connection  # why the run is to end


def run(work: Work, jobs: Iterator[Job], workers: int) -> Iterator[str]:
    """Does all the jobs, which are claimed, with so many at once; yields each file that is done.

    With no workers this process does them, without limits. Raises OSError where the work folder
    cannot be written to.
    """
    if workers == 0:
        for job in jobs:
            work.write(job)
            work.release(job.file)
            yield job.file
        return
    context = multiprocessing.get_context("forkserver")  # OpenGL does not survive a fork
    context.set_forkserver_preload(["__main__", __name__])
    running: dict[Any, _Running] = {}

    def start(job: Job, attempt: int) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(work, job, workers > 1, sender), daemon=True)
        with _no_interrupt():
            process.start()
        sender.close()
        running[process.sentinel] = _Running(process, job, attempt, time.monotonic(), receiver)

    resource_tracker.ensure_running()  # which would end the next block's blocking
    with _no_interrupt():
        forkserver.ensure_running()
    try:
        more = True
        while more or running:
            while more and len(running) < workers:
                job = next(jobs, None)
                more = job is not None
                if job is not None:
                    start(job, 1)
            if not running:
                break
            first = min(r.begun for r in running.values()) + work.limits.seconds
            ended = multiprocessing.connection.wait(
                list(running), timeout=max(0.0, first - time.monotonic())
            )
            late = time.monotonic() - work.limits.seconds
            ended += [s for s, r in running.items() if r.begun <= late and s not in ended]
            for sentinel in ended:
                one = running.pop(sentinel)
                reason = _ended(work, one)
                if reason is not None and one.process.exitcode < 0 and one.attempt < ATTEMPTS:
                    if one.begun > late:
                        start(one.job, one.attempt + 1)
                        continue
                if reason is not None:
                    work.quarantine(one.job.file, reason, time.monotonic() - one.begun)
                work.release(one.job.file)
                yield one.job.file
    finally:
        for one in running.values():
            one.process.kill()
            one.process.join()
            shutil.rmtree(work.partial(one.job.file, one.process.pid), ignore_errors=True)
            work.release(one.job.file)


def _ended(work: Work, one: _Running) -> str | None:
    """Why there is nothing of an asset whose process has ended or is late; None if there is."""
    late = one.process.exitcode is None
    if late:
        one.process.kill()
    one.process.join()
    said = None
    with contextlib.suppress(EOFError):
        said = one.said.recv() if one.said.poll() else None
    one.said.close()
    shutil.rmtree(work.partial(one.job.file, one.process.pid), ignore_errors=True)
    if work.done(one.job.file):
        return None
    if isinstance(said, OSError):
        raise said
    if said is not None:
        return said
    limits = work.limits
    if late or -one.process.exitcode == signal.SIGXCPU:
        return f"not done within {limits.seconds:g} s"
    name = signal.Signals(-one.process.exitcode).name if one.process.exitcode < 0 else "no word"
    why = ", as when memory runs out" if name == "SIGKILL" else ""
    return f"its process ended with {name}, {ATTEMPTS} times{why}"


def _work(work: Work, job: Job, many: bool, said: multiprocessing.connection.Connection) -> None:
    """The whole of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent has it, too, and ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if many:
        os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's llvmpipe
        os.environ.setdefault(blender.THREADS, "1")
    limits = work.limits
    threads = 2 if many else 1 + (os.cpu_count() or 1)  # whose time is added up
    seconds = int(limits.seconds * threads) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        if not job.renders:
            renderer_of(work.settings, job.program)
        most = _address_space() + limits.memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        work.write(job)
    except MemoryError:
        said.send(f"needs more than {limits.memory >> 20} MiB of memory")
    except OSError as error:
        said.send(error)
    except Exception as error:  # a fault of ours, which is to cost one asset and not the run
        traceback.print_exc()
        said.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    said.close()
    sys.stderr.flush()


def _address_space() -> int:
    """Bytes that this process has taken so far (Linux; elsewhere 0)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C reaches new processes, too, which would have something to say to it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
