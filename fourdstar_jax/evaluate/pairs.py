"""`fourdstar evaluate --pairs A B`: a page by which people say which of two results is better.

The page holds all its pictures, asks no server and does not tell whose a picture is: which result
is at the left, and the order of the objects, are drawn by a seed. The answers are a JSON file that
the reader saves: for each object A, B or "same", where A is the first of the two folders.
"""

import base64
import io
import json
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from fourdstar_jax.evaluate import clips
from fourdstar_jax.evaluate.clips import Entry, Source, View
from fourdstar_jax.evaluate.protocols import Protocol
from fourdstar_jax.folders import replace_file

PAGE = Path(__file__).with_name("pairs.html")
MAX_BYTES = 256 << 20  # of a page
FPS = 8.0
QUALITY = 85  # of WebP
GAP = 16  # pixels between left and right, with a line in their middle
ROW = 4  # views side by side, at most


def write(
    path: str | os.PathLike[str],
    first: Source,
    second: Source,
    protocol: Protocol,
    *,
    truths: Source | None = None,
    seed: int = 0,
    fps: float = FPS,
) -> int:
    """Writes the page; returns the number of objects in it.

    With `truths` the true first view stands above each pair. Raises ValueError for results that do
    not match, as in scoring, and for more pictures than a page may hold.
    """
    rng = np.random.default_rng(seed)
    matched = clips.pairs(first, second, protocol)
    if truths is not None:
        clips.pairs(truths, second, protocol)
    views: dict[str, list[clips.Pair]] = {}
    for pair in matched:
        views.setdefault(pair.object, []).append(pair)
    questions, size = [], 0
    names = sorted(views)
    for place in rng.permutation(len(names)):
        name = names[place]
        sides = _sides(views[name], protocol)
        swapped = bool(rng.integers(2))
        truth = "" if truths is None else _movie([_of_truth(truths.entries[name], protocol)], fps)
        question = {
            "object": name,
            "left": "B" if swapped else "A",
            "pair": _movie(sides[::-1] if swapped else sides, fps),
            "truth": truth,
        }
        size += len(question["pair"]) + len(truth)
        if size > MAX_BYTES:
            raise ValueError(
                f"more than {MAX_BYTES >> 20} MB of pictures at object {len(questions) + 1} of "
                f"{len(names)}: give fewer objects or views (--azimuths)"
            )
        questions.append(question)
    study = {
        "seed": seed,
        "results": {"A": first.path, "B": second.path},
        "questions": questions,
    }
    text = PAGE.read_text().replace("/* study */", json.dumps(study).replace("<", "\\u003c"))
    replace_file(Path(path), text.encode())
    return len(questions)


def _sides(views: list[clips.Pair], protocol: Protocol) -> list[UInt8[np.ndarray, "T h w 3"]]:
    """The frames of A and B, all views in rows."""
    both: tuple[list, list] = [], []
    for pair in views:
        where = f"object {pair.object}, view {pair.view}"
        second = _load(pair.truth, None, protocol, f"{where}: B")
        first = _load(pair.prediction, _size(second), protocol, f"{where}: A")
        if _size(first) != _size(second):  # a folder's size is its own; what is rendered follows
            second = _load(pair.truth, _size(first), protocol, f"{where}: B")
        if first.shape != second.shape:
            told = ["{0} frames of {2}x{1}".format(*x.shape) for x in (first, second)]
            raise ValueError(f"{where}: A has {told[0]} pixels, B {told[1]}")
        for frames, found in zip((first, second), both, strict=True):
            found.append(frames)
    return [_grid(frames) for frames in both]


def _size(frames: np.ndarray) -> tuple[int, int]:
    return frames.shape[2], frames.shape[1]


def _load(view: View, size: tuple[int, int] | None, protocol: Protocol, where: str) -> np.ndarray:
    try:
        return clips.on_background(view.load(size), protocol, where).images
    except ValueError as error:
        raise ValueError(
            str(error) if str(error).startswith(where) else f"{where}: {error}"
        ) from error


def _of_truth(entry: Entry, protocol: Protocol) -> np.ndarray:
    view = entry.views[0]
    return _load(view, None, protocol, f"object {entry.name}, view {view.name}: the truth")


def _grid(views: list[np.ndarray]) -> np.ndarray:
    if len({x.shape for x in views}) > 1:
        raise ValueError("views of one object differ in size or number of frames")
    blank = np.full_like(views[0], 255)
    columns = min(len(views), ROW) if len(views) != 4 else 2
    views = views + [blank] * (-len(views) % columns)
    rows = [np.concatenate(views[i : i + columns], axis=2) for i in range(0, len(views), columns)]
    return np.concatenate(rows, axis=1)


def _movie(parts: list[np.ndarray], fps: float) -> str:
    """Frames beside each other as an animated WebP, a data URI."""
    count, height = parts[0].shape[:2]
    gap = np.full((count, height, GAP, 3), 255, np.uint8)
    gap[:, :, GAP // 2 - 1 : GAP // 2 + 1] = 160
    frames = np.concatenate([x for part in parts for x in (gap, part)][1:], axis=2)
    pictures = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    out = io.BytesIO()
    pictures[0].save(
        out,
        "WEBP",
        save_all=True,
        append_images=pictures[1:],
        duration=round(1000 / fps),
        loop=0,
        quality=QUALITY,
    )
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
