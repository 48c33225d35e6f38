"""Captions of motions by a model that looks at the clips: what `fourdstar prepare --describe` does.

The table is one that `prepare --captions` reads: a row a motion, with the clip's id. It is there
whole at any moment, what is in it is not described again, and rows of others stay.
"""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from fourdstar_jax import bars, remote
from fourdstar_jax.data import pipeline, transforms
from fourdstar_jax.data.quarantine import CorruptRecord
from fourdstar_jax.text import captions

# frames [T, h, w, 3] on white and how many of them are a second, to what a model says
Answer = Callable[[np.ndarray, float], str]
FRAMES = 8  # that the model sees of a clip, at most
MAX_WORDS = 12
SAVE_S = 30.0  # a process that is killed loses no more than this
# what models say before the motion although they are asked not to
_LISTS = re.compile(r"^(?:[-*•#>]+|\d+[.)])\s+")
_BODY = re.compile(
    r"^(?:(?:the|this|an?)\s+)?(?:3d\s+)?(?:object|character|figure|model|animal|creature)"
    r"(?:\s+(?:is|are|appears to be|seems to be)|'s)?(?:\s+|$)|^(?:it\s+is|it's|it)(?:\s+|$)"
)
_ARTICLE = re.compile(r"^(?:the|an?)(?:\s+|$)")


class Report(NamedTuple):
    """How many motions got a row, how many had one, and whose answers were empty."""

    described: int
    kept: int
    empty: list[str]


def describe(
    data_dir: str | Path,
    out_file: str | Path,
    load: Callable[[], Answer],
    *,
    frames: int = FRAMES,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> Report:
    """Adds a row to a table of captions for every motion of a dataset that has none there.

    The model sees the front view of the clip, of one with several rigs that of the first. A motion
    whose answer is empty gets no row, so a later run asks again. After an error, too, the table has
    what was described before.

    Args:
      load: gives the model; called once, and only if there is something to describe.
      frames: of a clip, evenly chosen, that the model sees; a shorter clip is seen whole.
      overwrite: describe all motions anew, and keep no row of an earlier table.

    Raises ValueError for a folder that is no dataset, a file that is no table of captions, and more
    unreadable records than `Quarantine` allows, besides what `load` raises.
    """
    if frames < 1:
        raise ValueError(f"{frames=} must be positive")
    if remote.url_of(out_file) is not None:
        raise ValueError(f"{out_file}: the table of captions must be a file of this machine")
    rows = captions.read([out_file]) if Path(out_file).exists() else {}
    if overwrite:
        rows = {}
    splits = list(pipeline.read_manifest(data_dir)["splits"])
    motions = [(split, *motion) for split in splits for motion in _motions(data_dir, split)]
    wanted = [one for one in motions if one[1] not in rows]
    kept, described, empty = len(motions) - len(wanted), 0, []
    if wanted:
        answer = load()
        source = {s: pipeline.ClipSource(data_dir, s, cache_bytes=0, maps=()) for s in splits}
        saved = time.monotonic()
        try:
            with bars.steps(len(wanted), desc="motions", unit="clip") as step:
                for split, motion, i in wanted:
                    try:
                        clip = source[split][i]
                    except CorruptRecord as error:
                        source[split].quarantine.add(str(error))
                    else:
                        if text := clean(answer(*shown(clip, frames))):
                            rows[motion] = text
                            described += 1
                        else:
                            empty.append(motion)
                    if described and time.monotonic() - saved > SAVE_S:
                        captions.write(out_file, rows)
                        saved = time.monotonic()
                    step()
        finally:
            if described:
                captions.write(out_file, rows)
    log(
        f"{described} motions described, {kept} were there, {len(empty)} answers were empty and "
        f"have no row: {out_file}"
    )
    return Report(described, kept, empty)


def _motions(data_dir: str | Path, split: str) -> list[tuple[str, int]]:
    """The ids of a split's motions, in order, each with the number of its first rig's record."""
    records = pipeline.Records(data_dir, split, only=["clip_id"])
    clips = []
    for i in range(len(records)):
        try:
            clips.append((pipeline.as_text(records[i]["clip_id"]), i))
        except CorruptRecord as error:
            records.quarantine.add(str(error))
    numbers: dict[str, int] = {}
    for clip_id, i in sorted(clips):
        numbers.setdefault(captions.motion_id(clip_id), i)
    return list(numbers.items())


def shown(clip: dict[str, Any], frames: int) -> tuple[UInt8[np.ndarray, "T h w 3"], float]:
    """What the model sees of a clip of `ClipSource`: the front view on white; frames a second."""
    total = len(clip["frame_times"])
    count = min(frames, total)
    chosen = np.arange(count) * total // count
    images, _ = transforms.on_white(clip["rig_rgba"][chosen, 0])
    return np.rint(images * 255).astype(np.uint8), clip["fps"] * count / total


def clean(answer: str) -> str:
    """A model's answer as a caption of a motion: "The object is jumping up." -> "jumping up".

    Its first line in lower case, without quotes, marks of lists, a full stop and the article or
    "the object is" before it, cut to MAX_WORDS words; "" if there is no letter in it.
    """
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in answer.splitlines()]
    text = next((line for line in map(_bare, lines) if any(map(str.isalpha, line))), "")
    for opening in (_LISTS, _BODY, _ARTICLE):
        text = _bare(opening.sub("", text))
    return _bare(" ".join(text.split()[:MAX_WORDS]))


def _bare(text: str) -> str:
    """In lower case, single blanks, without what stands around a phrase."""
    return " ".join(text.lower().split()).strip(" \"'`*_.,;:!?…“”‘’")
