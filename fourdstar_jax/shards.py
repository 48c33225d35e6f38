"""A list that many processes on many machines work through, sharing nothing but a folder.

Each has its part of the list and, when that is done, takes what others have not begun. Who is at
what is a file in a folder, a claim. Two may now and then do the same (a clock that is wrong, a
claim that was given up too early): whoever is first to name the output, as `folders` does, counts.
"""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Shard(NamedTuple):
    """One of so many parts of a list: every `parts`-th item from number `part` on."""

    part: int = 0
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From "i/n", with i from 0 to n - 1. Raises ValueError."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise ValueError(f"must be I/N with I from 0 to N - 1, such as 0/4, not {text[:40]!r}")
        return cls(int(found[1]), int(found[2]))

    def own(self, length: int) -> Iterator[int]:
        """Numbers of its own items."""
        yield from range(self.part, length, self.parts)

    def others(self, length: int) -> Iterator[int]:
        """Numbers of all others' items, the next shard's first and each shard's from its end."""
        for step in range(1, self.parts):
            yield from reversed(range((self.part + step) % self.parts, length, self.parts))


WHOLE = Shard()


class Claims:
    """Who works on what: a file an item in a folder that all processes see.

    A claim ends with `release`, with the process that has it if that was on this machine, and
    otherwise `lasts_s` seconds after it was made.
    """

    def __init__(self, folder: Path, lasts_s: float):
        self.folder, self.lasts_s = folder, lasts_s
        self._held: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def take(self, name: str) -> bool:
        """Whether the item is now this process's."""
        path = self.folder / name
        for _ in range(2):
            try:
                with open(path, "x") as file:
                    file.write(_identity(os.getpid()))
                self._held.add(name)
                return True
            except FileExistsError:
                if not self._given_up(path):
                    return False
            aside = path.with_name(f".{name}.{time.time_ns()}.{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):  # another was faster
                path.rename(aside)
                aside.unlink()
        return False

    def release(self, name: str) -> None:
        """Another process may take the item: it is done, or given up."""
        self._held.discard(name)
        (self.folder / name).unlink(missing_ok=True)

    def release_all(self) -> None:
        """Gives up whatever this process has."""
        for name in list(self._held):
            self.release(name)

    def _given_up(self, path: Path) -> bool:
        try:
            text, made = path.read_text(), path.stat().st_mtime
        except FileNotFoundError:
            return True
        place, _, process = text.rpartition(" ")
        if place == _PLACE:
            pid = process.partition(".")[0]
            if pid == str(os.getpid()):
                return path.name not in self._held
            return text != _identity(int(pid))
        return time.time() - made > self.lasts_s


def _place() -> str:
    """This machine, or this container of it: where numbers of processes mean the same."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}"


_PLACE = _place()


def _identity(pid: int) -> str:
    """Machine and process, which is told from a later one of the same number by its start."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        start = "gone" if state in "ZX" else fields[18]
    except OSError:
        start = "gone" if Path("/proc/self").exists() and pid != os.getpid() else ""
    return f"{_PLACE} {pid}.{start}"
