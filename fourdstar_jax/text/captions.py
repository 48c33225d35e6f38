"""Captions of objects and motions, made from their names.

The names that artists give ("AnimalArmature|Attack_Headbutt" on "animals_pack__Bull.glb") are all
the text that comes with the files; cleaned, they make "a bull, attack headbutt".
"""

import re
from pathlib import Path

NEUTRAL_PROMPT = "Generate object of the following video"  # the paper's, when no text is given

_NOISE = {"transformed", "animations", "animation", "animated", "armature", "action", "smooth"}
_NOISE |= {"flatshaded", "anim", "rig", "clip", "godot", "mixamo", "com"}
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
    words = _words(Path(object_name).stem.split("__")[-1])
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
