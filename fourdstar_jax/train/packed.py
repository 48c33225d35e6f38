"""A run's state as numbered files of a limited size, to be carried elsewhere and continued there.

`manifest.json` names the files of the run with their sizes, in order; end to end they are the
parts, `part-0000.bin` and on. Nothing else is read.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fourdstar_jax import folders, outside, remote
from fourdstar_jax.train.checkpoint import damage, steps_in
from fourdstar_jax.train.workdir import NEEDED

PART_BYTES = 16 << 20
MAX_PART_BYTES = 1 << 30
PIECE = 1 << 20
# What a packed run may hold, of `checkpoints/<step>/` and `NEEDED`; no part of it begins with two
# dots, or is one.
PATH = (
    r"(?:checkpoints/\d+/|best/)(?:(?!\.\.?(?:/|$))[\w.+=,~-]+/)*(?!\.\.?$)[\w.+=,~-]+|[\w-]+\.\w+"
)


def pack(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    part_bytes: int = PART_BYTES,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Packs what goes on from a run's newest sound checkpoint into folder `out`.

    That is the checkpoint (weights, their average, moments, step and place in the data, every bit),
    the log and the best weights so far. Returns the manifest. The run must not be writing. Raises
    ValueError if there is no checkpoint, or for a run in an object store.
    """
    run = _local(run)
    step = _newest(run)
    found = sorted((run / "checkpoints" / str(step)).rglob("*"))
    for name in NEEDED:
        found += sorted((run / name).rglob("*")) if name.endswith("/") else [run / name]
    files = [path for path in found if path.is_file()]
    names = [path.relative_to(run).as_posix() for path in files]
    for path, name in zip(files, names, strict=True):
        if not re.fullmatch(PATH, name):
            raise ValueError(f"{path} is no file that a run writes: take it out of there")
    sizes: list[int] = []
    with folders.output_folder(out, folders.PACKED, overwrite=overwrite) as partial:
        parts = _write_parts(_pieces(files, sizes), partial, part_bytes)
        manifest = {
            "packed": "fourdstar_jax run",
            "step": step,
            "files": [
                {"path": name, "bytes": size} for name, size in zip(names, sizes, strict=True)
            ],
            "parts": parts,
        }
        (partial / folders.PACKED.manifest).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def unpack(packed: str | os.PathLike[str], run: str | os.PathLike[str]) -> dict[str, Any]:
    """Makes folder `run`, new or empty, of a packed one; the trainer goes on there.

    Returns the manifest. Raises ValueError, which names the part or field, for one that is missing
    or is not as it was written; then there is no `run`.
    """
    packed = remote.fetched(packed)
    if remote.url_of(run) is not None:
        raise ValueError(f"{run}: a run is unpacked into a local folder")
    found = outside.read(packed / folders.PACKED.manifest)
    found.text("packed", choices=["fourdstar_jax run"])
    found.integer("step", 0, 1 << 62)
    files, parts = found.parts("files"), found.parts("parts")
    sizes = [part.integer("bytes", 1, MAX_PART_BYTES) for part in parts]
    wanted = [file.integer("bytes", 0, 1 << 62) for file in files]
    if sum(sizes) != sum(wanted):
        raise ValueError(f"{found.where}: files of {sum(wanted)} bytes in parts of {sum(sizes)}")
    for i, part in enumerate(parts):
        part.text("file", choices=[_name(i)])
    with folders.output_folder(run, folders.PACKED) as partial:
        stream = _Stream(_checked(packed, parts))
        for file, size in zip(files, wanted, strict=True):
            target = partial / file.text("path", pattern=PATH)
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as sink:
                stream.copy(size, sink)
    return found.values


def _local(run: str | os.PathLike[str]) -> Path:
    if remote.url_of(run) is not None:
        raise ValueError(f"{run}: a run is packed from a local folder")
    return Path(run)


def _newest(run: Path) -> int:
    """The newest checkpoint that is as it was written; those that are not are told on stderr."""
    folder = run / "checkpoints"
    for step in sorted(steps_in(folder), reverse=True) if folder.is_dir() else ():
        problem = damage(folder / str(step))
        if problem is None:
            return step
        print(f"checkpoint {folder / str(step)} is damaged: {problem}", file=sys.stderr)
    raise ValueError(f"{run} is no run to pack: there is no sound checkpoint in {folder}")


def _name(number: int) -> str:
    return f"part-{number:04d}.bin"


def _pieces(files: list[Path], sizes: list[int]) -> Iterator[bytes]:
    """The files' bytes, one file after another; notes how many were read of each."""
    for path in files:
        size = 0
        with path.open("rb") as source:
            while piece := source.read(PIECE):
                size += len(piece)
                yield piece
        sizes.append(size)


def _write_parts(pieces: Iterator[bytes], folder: Path, limit: int) -> list[dict[str, Any]]:
    parts, left = [], b""
    while True:
        name, hashed, size = _name(len(parts)), hashlib.sha256(), 0
        with (folder / name).open("wb") as sink:
            while size < limit and (piece := left or next(pieces, b"")):
                piece, left = piece[: limit - size], piece[limit - size :]
                sink.write(piece)
                hashed.update(piece)
                size += len(piece)
        if size == 0:
            (folder / name).unlink()
            return parts
        parts.append({"file": name, "bytes": size, "sha256": hashed.hexdigest()})


def _checked(folder: Path, parts: list[outside.Fields]) -> Iterator[bytes]:
    """The parts, each looked at as a whole before any of it is used."""
    for part in parts:
        path = folder / part.text("file")
        size, sha256 = (
            part.integer("bytes", 1, MAX_PART_BYTES),
            part.text("sha256", pattern=outside.SHA256),
        )
        if not path.is_file():
            raise ValueError(f"{path} is missing, one of {len(parts)} parts")
        if path.stat().st_size != size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, not {size}")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of the manifest")
        yield data


class _Stream:
    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._data = parts, memoryview(b"")

    def copy(self, size: int, sink: IO[bytes]) -> None:
        while size > 0:
            if not self._data:
                self._data = memoryview(next(self._parts))
            sink.write(self._data[:size])
            taken = min(size, len(self._data))
            self._data, size = self._data[taken:], size - taken
