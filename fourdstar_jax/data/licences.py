"""Which assets have a licence: however it is written, and never a narrower one by mistake."""

import re
from collections import Counter
from collections.abc import Iterable

UNKNOWN = "unknown"  # of assets that assets.csv does not list
# What narrows a licence whose name it follows: CC-BY is not CC-BY-NC.
_NARROWER = {"sa", "nc", "nd"}
_NOISE = {"the", "license", "licence", "universal", "international", "unported", "deed"}
_NAMES = {
    r"creative commons zero|cc[ -]?zero|cc[ -]0": "cc0",
    r"creative commons attribution|creative commons by": "cc by",
    r"creative commons": "cc",
    r"share[ -]?alike": "sa",
    r"non[ -]?commercial": "nc",
    r"no[ -]?deriv(?:ative)?s?": "nd",
    r"\b(cc)[ -]?(by)\b": r"\1 \2",
}


def has(licence: str, wanted: str) -> bool:
    """Whether an asset's licence is the one wanted, of any version unless that names one.

    "cc0", "CC-0", "CC0 1.0" and "Creative Commons Zero" are CC0-1.0. What stands in brackets or
    after a comma is remark. Raises ValueError if nothing is wanted.
    """
    words = _words(wanted)
    if not words:
        raise ValueError(f"licence {wanted!r} names none")
    found = _words(licence)
    rest = found[len(words) :]
    return found[: len(words)] == words and not _NARROWER & set(rest)


def listed(licences: Iterable[str]) -> str:
    """The licences there are and how often, the most frequent first, in one line."""
    counts = Counter(_name(licence) or UNKNOWN for licence in licences)
    named = [f"{name} ({n})" for name, n in counts.most_common(8)]
    more = len(counts) - len(named)
    return ", ".join(named) + (f" and {more} others" if more > 0 else "")


def _name(licence: str) -> str:
    """A licence without remarks."""
    return re.split(r"[(,;]", licence)[0].strip()[:60]


def _words(licence: str) -> list[str]:
    text = _name(licence).lower().replace("_", " ")
    for pattern, name in _NAMES.items():
        text = re.sub(pattern, name, text)
    words = [re.sub(r"^v(?=\d)", "", word) for word in re.findall(r"[a-z0-9.+:]+", text)]
    return [f"{w}.0" if w.isdigit() else w for w in words if w not in _NOISE]
