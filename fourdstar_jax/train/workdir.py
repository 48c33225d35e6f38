"""A run's folder, which may be one in an object store."""

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fourdstar_jax import remote
from fourdstar_jax.folders import DATASET

# what a run that goes on needs of the one before, besides its checkpoints
NEEDED = ("metrics.jsonl", "warm_start.txt", "goodput.json", "best/")


class Workdir(os.PathLike[str]):
    """A local folder as it is; of one in an object store, a local copy to write to.

    Checkpoints go to the store directly, into `checkpoints`. All else goes there by `send`, which
    is called before each checkpoint is saved and at the end. Every process has a copy of its own;
    that of process 0 is sent. Raises ValueError for a local one that is another output's.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.url = remote.url_of(path)
        if self.url is None:
            self.local = Path(path)
            if (self.local / DATASET.manifest).exists():
                raise ValueError(
                    f"--workdir={path} holds a dataset or another output (it has "
                    f"{DATASET.manifest}): a run needs a folder of its own"
                )
            self.checkpoints: Any = self.local.resolve() / "checkpoints"
            return
        from etils import epath

        self.checkpoints = epath.Path(self.url) / "checkpoints"
        place = self.url.replace("://", "/", 1)
        self.local = remote.cache() / "runs" / f"process_{jax.process_index()}" / place
        shutil.rmtree(self.local, ignore_errors=True)
        self.local.mkdir(parents=True)
        for name in remote.names(self.url):
            if name.startswith(NEEDED):
                target = self.local / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(remote.fetched(f"{self.url}/{name}"), target)
        self._sent = self._files()

    def __fspath__(self) -> str:
        return str(self.local)

    def __str__(self) -> str:
        return self.url or str(self.local)

    def send(self) -> None:
        """Sends what has changed since the last call to the store, if this is the first process."""
        if self.url is None or jax.process_index() != 0:
            return
        files = self._files()
        changed = [name for name, state in files.items() if self._sent.get(name) != state]
        remote.send(self.local, self.url, changed)
        self._sent = files

    def _files(self) -> dict[str, tuple[int, int]]:
        """Size and time of every file that is whole."""
        found = {}
        for path in self.local.rglob("*"):
            name = path.relative_to(self.local).as_posix()
            if path.is_file() and not path.name.startswith(".") and ".partial" not in name:
                stat = path.stat()
                found[name] = (stat.st_size, stat.st_mtime_ns)
        return found


def kept(train: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """A trainer whose `workdir` may be in an object store: what it has written is sent there."""

    @functools.wraps(train)
    def run(config: Any, workdir: str | os.PathLike[str]) -> None:
        folder = Workdir(workdir)
        try:
            train(config, folder)
        finally:
            folder.send()

    return run
