"""Captions of objects and motions: made from their names, or from tables that others made.

The names that artists give ("AnimalArmature|Attack_Headbutt" on "animals_pack__Bull.glb") are all
the text that comes with the files; cleaned, they make "a bull, attack headbutt".
"""

import csv
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from fourdstar_jax.folders import output_file

NEUTRAL_PROMPT = "Generate object of the following video"  # the paper's, when no text is given

_NOISE = {"transformed", "animations", "animation", "animated", "armature", "action", "smooth"}
_NOISE |= {"flatshaded", "anim", "rig", "clip", "godot", "mixamo", "com"}
_UID = re.compile("[0-9a-f]{32}")  # Objaverse's, which says nothing
_SPELLING = {"recieve": "receive", "headlow": "head low", "toidle": "to idle"}


def _words(name: str) -> list[str]:
    """Lower-case words of a name in CamelCase, snake_case or with spaces; numbers at the end go."""
    name = re.sub(r"[^0-9A-Za-z]+", " ", name)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z0-9])(?=[A-Z][a-z])", " ", name)
    words = [_SPELLING.get(w, w) for w in name.lower().split()]
    kept = [w for w in words if w not in _NOISE] or words
    while len(kept) > 1 and kept[-1].isdigit():
        kept.pop()
    if len(kept) == 1:
        kept = [re.sub(r"(?<=[a-z]{3})\d+$", "", kept[0])]
    return kept


def appearance_caption(object_name: str) -> str:
    """ "animals_pack__Bull.glb" -> "a bull"; what precedes a double underscore is the pack."""
    name = Path(object_name).stem
    words = [] if _UID.fullmatch(name) else _words(name.split("__")[-1])
    article = "an" if words and words[0][0] in "aeiou" else "a"
    return " ".join([article, *words]) if words else "an object"


def motion_caption(clip_name: str) -> str:
    """ "AnimalArmature|Attack_Headbutt" -> "attack headbutt"; armature prefixes go."""
    last = clip_name.split("|")[-1]
    words = [w for w in _words(last) if w not in _NOISE]
    generic = not words or all(w.isdigit() for w in words) or re.fullmatch(r"clip \d+", clip_name)
    return "moving" if generic else " ".join(words)


def caption(appearance: str, motion: str) -> str:
    """ "a bull", "attack headbutt" -> "a bull, attack headbutt".

    Words of the body that open the motion's name are said once: "a wasp", "wasp death".
    """
    body, words = set(appearance.split()), motion.split()
    while len(words) > 1 and words[0] in body:
        words.pop(0)
    return f"{appearance}, {' '.join(words)}"


def motion_id(clip_id: str) -> str:
    """The id of a clip's motion in tables: "pack/Bull#2@1" -> "pack/Bull#2", whatever its rig."""
    object_id, _, number = clip_id.rpartition("#")
    return f"{object_id}#{number.partition('@')[0]}"


def read(paths: Iterable[str | Path], wanted: Collection[str] | None = None) -> dict[str, str]:
    """The captions of CSV files as Cap3D's, `id,caption` without a header, of the ids in `wanted`.

    None wants all. Of an id that occurs twice the last counts. Raises ValueError, which names the
    line, for a row that is not so, whoever's it is.
    """
    found = {}
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                for row in _rows(file, path):
                    if wanted is None or row[0].strip() in wanted:
                        found[row[0].strip()] = _tidy(row[1])
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
            raise ValueError(f"{path} cannot be read: {why}") from error
    return found


def write(path: str | Path, captions: Mapping[str, str]) -> None:
    """Writes a CSV file that `read` reads; at any moment the file is the old one or the new one."""
    with (
        output_file(path) as partial,
        open(partial, "w", newline="", encoding="utf-8") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(captions.items())


def _rows(file: Iterable[str], path: str | Path) -> Iterator[list[str]]:
    rows = csv.reader(file, strict=True)
    try:
        for row in rows:
            if len(row) != 2 or not row[0].strip() or not _tidy(row[1]):
                shown = ascii(",".join(row)[:60])
                raise ValueError(f"{path}, line {rows.line_num}: {shown} is no id and caption")
            yield row
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from error


def _tidy(text: str) -> str:
    """In one line, without the full stop."""
    return " ".join(text.split()).removesuffix(".").strip()
