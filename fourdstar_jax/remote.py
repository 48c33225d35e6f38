"""Paths in object stores, `gs://bucket/folder` and `s3://bucket/folder`.

What is read is fetched first, into `$FOURDSTAR_CACHE` (`~/.cache/fourdstar`), where later calls
find it while it has not changed; what is written is sent when it is whole, the JSON file that
describes a folder last. Readers and writers see local files alone. Checkpoints go there directly.
Credentials are those of the stores' own tools (`AWS_*`, Application Default Credentials).
"""

import contextlib
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

EXTRA = "pip install 'fourdstar-jax[remote]'"
# `Path` makes one slash of two
_URL = re.compile(r"(gs|s3):/+([^/].*)")
AT_ONCE = 64  # files


def url_of(path: str | os.PathLike[str]) -> str | None:
    """The URL of a path in an object store; None for a local one."""
    found = _URL.fullmatch(os.fspath(path))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def cache() -> Path:
    """Where fetched files lie."""
    chosen = os.environ.get("FOURDSTAR_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fourdstar"


def store_of(url: str) -> Any:
    """The fsspec file system of a URL. Raises ValueError where its package is missing."""
    import fsspec

    try:
        store = fsspec.filesystem(url.partition(":")[0])
    except ImportError as error:
        raise ValueError(f"{url} needs {error.name or 'a package'}: {EXTRA}") from error
    store.invalidate_cache()
    return store


def fetched(path: str | os.PathLike[str]) -> Path:
    """The local path of a file or folder: itself, or a copy of what is in the store.

    Files that have the size and time of the store's are not fetched again. Raises ValueError for
    what does not exist or cannot be read.
    """
    url = url_of(path)
    if url is None:
        return Path(path)
    local = cache() / url.replace("://", "/", 1)
    with explained(url, "read"):
        store = store_of(url)
        found = _listed(store, url)
        if not found:
            raise ValueError(f"{url} does not exist")
        wanted = [name for name, (size, time) in found.items() if not _is(local / name, size, time)]
        for names in itertools.batched(wanted, AT_ONCE):
            _fetch(store, url, local, {name: found[name] for name in names})
        if local.is_dir():
            kept = {local / name for name in found}
            for file in [file for file in local.rglob("*") if file.is_file()]:
                if file not in kept and not file.name.startswith("."):  # another process' partial
                    file.unlink(missing_ok=True)
    return local


def send(local: Path, url: str, names: Iterable[str]) -> None:
    """Puts files below a local folder to the same places below a URL, JSON last."""
    ordered = sorted(names, key=lambda name: (name.endswith(".json"), name))
    with explained(url, "written"):
        store = store_of(url)
        for _, group in itertools.groupby(ordered, key=lambda name: name.endswith(".json")):
            for some in itertools.batched(group, AT_ONCE):
                store.put([str(local / name) for name in some], [f"{url}/{name}" for name in some])


def names(url: str) -> list[str]:
    """The files below a URL, by their place there; none if it does not exist."""
    with explained(url, "read"):
        return sorted(name for name in _listed(store_of(url), url) if name)


def move(url: str, to: str) -> None:
    """Gives all below a URL another name; what was below that is removed."""
    remove(to)
    files = names(url)
    with explained(url, "moved"):
        store_of(url).copy([f"{url}/{name}" for name in files], [f"{to}/{name}" for name in files])
    remove(url)


def remove(url: str) -> None:
    """Removes a file, or all below a URL."""
    with explained(url, "removed"):
        store = store_of(url)
        if store.exists(url):
            store.rm(url, recursive=True)


def _listed(store: Any, url: str) -> dict[str, tuple[int, float | None]]:
    """Size and time of change of all files below a URL, or of the one that it is (named "")."""
    root, found = store._strip_protocol(url), {}
    for path, entry in store.find(url, detail=True).items():
        time = entry.get("LastModified") or entry.get("mtime")
        if entry["size"] is not None and not path.endswith("/"):  # which stands for a folder
            found[path.removeprefix(root).lstrip("/")] = (
                entry["size"],
                time.timestamp() if time is not None else None,
            )
    return found


def _is(file: Path, size: int, time: float | None) -> bool:
    """Whether a file is the one of this size and time."""
    try:
        stat = file.stat()
    except OSError:
        return False
    return stat.st_size == size and time is not None and int(stat.st_mtime) == int(time)


def _fetch(store: Any, url: str, local: Path, files: dict[str, tuple[int, float | None]]) -> None:
    """Each is there whole or not at all."""
    partials = {}
    for name in files:
        target = local / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partials[name] = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        sources = [f"{url}/{name}" if name else url for name in files]
        store.get(sources, [str(path) for path in partials.values()])
        for name, (_, time) in files.items():
            if time is not None:
                os.utime(partials[name], (time, time))
            partials[name].replace(local / name)
    finally:
        for path in partials.values():
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(url: str, what: str) -> Iterator[None]:
    """Whatever a store raises as one line."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        line = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{url} cannot be {what}: {line}") from error
