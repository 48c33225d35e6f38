"""Output folders and files that are there whole or not at all, and their hashes.

One rule for every writer: what is written goes to a sibling first and gets its name when it is
complete, and only a folder that this project wrote, of the same kind, is ever replaced.
"""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fourdstar_jax import outside, remote

_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())
_unfinished: set[Path] = set()  # what this process has begun to write
_LEFT = re.compile(r"\.(?P<what>partial|replaced)-(?:(?P<host>.+)\.)?(?P<pid>\d+)")


# no room, on the disk, for a file or in a quota
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


class Kind(NamedTuple):
    """A kind of folder that this project writes, and how one is told from anybody's."""

    name: str
    manifest: str  # a JSON file in it
    keys: frozenset[str]  # that the manifest holds


OBJECT = Kind("object", "manifest.json", frozenset({"timesteps", "gaussians", "files"}))
EXPORT = Kind("export", "manifest.json", frozenset({"exported_from", "formats", "files"}))
PICTURES = Kind("pictures", "manifest.json", frozenset({"tokenizer", "files"}))
PACKED = Kind("packed run", "manifest.json", frozenset({"packed", "step", "parts"}))
WORK = Kind("work", "settings.json", frozenset({"settings", "split_sha256"}))
DATASET = Kind("dataset", "manifest.json", frozenset({"settings", "splits", "split_sha256"}))
TOKENS = Kind("tokens", "spec.json", frozenset({"tokenizer", "splits", "data"}))
FEATURES = Kind("text features", "manifest.json", frozenset({"encoder", "rows", "data"}))


def _full(partial: Path, error: OSError) -> str:
    """How far it came, and what room there is."""
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    free = shutil.disk_usage(partial.parent).free
    return f"{error.strerror} after {written / 1e6:.1f} MB; {free / 1e6:.0f} MB are free"


def is_of_kind(path: str | os.PathLike[str], kind: Kind) -> bool:
    """Whether a folder is one that this project wrote."""
    try:
        return kind.keys <= set(outside.read(remote.fetched(os.path.join(path, kind.manifest))))
    except ValueError:
        return False


def check_object(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless a folder is an output of `generate` or `reconstruct`."""
    if remote.url_of(path) is None and not os.path.exists(path):
        raise ValueError(f"{path} does not exist")
    if not is_of_kind(path, OBJECT):
        raise ValueError(f"{path} is no output of `fourdstar generate` or `reconstruct`")


def check_dataset(path: str | os.PathLike[str]) -> Path:
    """The manifest of a dataset. Raises ValueError if there is none."""
    manifest = remote.fetched(path) / DATASET.manifest
    if not manifest.is_file():
        there = f"has no {DATASET.manifest}"
        if not manifest.parent.is_dir():
            there = "is a file" if manifest.parent.exists() else "is not there"
        raise ValueError(f"the dataset {path} {there}: `fourdstar prepare` makes datasets")
    return manifest


@contextlib.contextmanager
def output_folder(
    path: str | os.PathLike[str], kind: Kind, *, overwrite: bool = False
) -> Iterator[Path]:
    """A temporary sibling of `path` to write to, which becomes `path` when the block succeeds.

    After an error nothing is left, and what a killed process left of the same target is removed.
    Raises ValueError, before anything is written, if another process of this machine is at it, or
    if `path` is a file or a folder that is not empty; `overwrite` allows the latter, but only for a
    folder of this kind, which is replaced whole. In an object store, where nothing can be renamed,
    the files are sent when the block succeeds, the manifest last; until then a folder that is
    replaced has none.
    """
    if (url := remote.url_of(path)) is not None:
        with _sent_folder(url, kind, overwrite) as partial:
            yield partial
        return
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output folder {path} is a file")
    with contextlib.suppress(OSError):
        _clear_up(path)
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise ValueError(f"output folder {path} is not empty (--overwrite replaces it)")
        _check_kind(path, kind)
    partial = _sibling(path, "partial")
    for other in _partials(path):
        if other != partial:
            raise ValueError(f"output folder {path} is being written by another process: {other}")
    with _begun(partial):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove(partial)
            partial.mkdir()
        except OSError as error:
            why = "Not a directory" if path.parent.is_file() else error.strerror
            raise ValueError(f"output folder {path} cannot be made: {why}") from error
        try:
            yield partial
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise ValueError(
                f"output folder {path} cannot be written: {_full(partial, error)}"
            ) from error
        replaced = _sibling(path, "replaced")
        if path.exists():
            if not overwrite and any(path.iterdir()):
                raise ValueError(f"output folder {path} was written by another process meanwhile")
            path.rename(replaced)
        partial.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def _sent_folder(url: str, kind: Kind, overwrite: bool) -> Iterator[Path]:
    there = remote.names(url)
    if there and not overwrite:
        raise ValueError(f"output folder {url} is not empty (--overwrite replaces it)")
    if there:
        _check_kind(url, kind)
    partial = _sibling(remote.cache() / "written" / url.replace("://", "/", 1), "partial")
    with _begun(partial):
        _remove(partial)
        partial.mkdir(parents=True)
        yield partial
        if there:
            remote.remove(f"{url}/{kind.manifest}")
        new = [path.relative_to(partial).as_posix() for path in partial.rglob("*")]
        remote.send(partial, url, [name for name in new if (partial / name).is_file()])
        for name in set(there) - set(new):
            remote.remove(f"{url}/{name}")


def _check_kind(path: str | os.PathLike[str], kind: Kind) -> None:
    if not is_of_kind(path, kind):
        raise ValueError(
            f"{path} is no {kind.name} folder that fourdstar_jax wrote (it has no such "
            f"{kind.manifest}): it is not overwritten"
        )


@contextlib.contextmanager
def output_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of a file to write to, which becomes the file when the block succeeds.

    At any moment the file is the old one or the new one. After an error nothing is left; an OSError
    about the temporary one names the file instead.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):
        _clear_up(path)
    partial = _sibling(path, "partial")
    with _begun(partial):
        try:
            yield partial
            partial.replace(path)
        except OSError as error:
            if error.filename is not None and os.fsdecode(error.filename) == str(partial):
                error.filename = str(path)
            raise


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file as `output_file` does."""
    with output_file(path) as partial:
        partial.write_bytes(data)


def abandon() -> None:
    """Removes all that this process has begun to write: it is about to end."""
    for partial in list(_unfinished):
        _remove(partial)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, which is read a piece at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _begun(partial: Path) -> Iterator[None]:
    """Until the end of the block, at which it is removed, this file or folder is unfinished."""
    _unfinished.add(partial)
    try:
        yield
    finally:
        _remove(partial)
        _unfinished.discard(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        # not there, or in a file that stands for its folder
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(path)  # a disk that is read only says so before it says that nothing is there
            path.unlink()


def _sibling(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{_HOST}.{os.getpid()}")


def _clear_up(path: Path) -> None:
    """Removes what processes that are gone have left of a target.

    One that was killed between putting an older folder aside and naming its own left neither: the
    older one gets its name back. Processes of other machines may still run, and are left alone.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        found = _LEFT.fullmatch(left.name[len(path.name) + 1 :])
        if found is None or found["host"] not in (None, _HOST) or _runs(int(found["pid"])):
            continue
        if found["what"] == "replaced" and not path.exists():
            left.rename(path)
        else:
            _remove(left)


def _partials(path: Path) -> Iterator[Path]:
    """What processes of this machine that run have begun to write of a folder."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        found = _LEFT.fullmatch(left.name[len(path.name) + 1 :])
        if found is not None and found["host"] == _HOST and _runs(int(found["pid"])):
            yield left


def _runs(pid: int) -> bool:
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
