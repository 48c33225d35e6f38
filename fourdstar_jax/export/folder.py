"""Output folders that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

MANIFEST = "manifest.json"


@contextlib.contextmanager
def output_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` to write to, which becomes `path` when the block succeeds.

    After an error nothing is left. Raises ValueError, before anything is written, if `path` is a
    file or a folder that is not empty; `overwrite` allows the latter, but only for a folder that
    this package wrote (it holds a manifest), which is replaced whole.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output folder {path} is a file")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"output folder {path} is not empty (--overwrite replaces it)")
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{path} holds no {MANIFEST}: not an output to be overwritten")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise ValueError(f"output folder {path} cannot be made: {error.strerror}") from error
    try:
        yield partial
        replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
