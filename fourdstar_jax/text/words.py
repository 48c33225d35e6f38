"""Captions as rows of a small learned table: T5's word pieces, numbered anew by what occurs.

The table of STAR's `text_encoder="words"` has one row for every piece of the training captions, so
a model carries a few hundred rows and not T5's 32,100. Row 0 pads, row 1 stands for all other
pieces.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from fourdstar_jax.outside import Fields
from fourdstar_jax.text import pieces
from fourdstar_jax.text.captions import NEUTRAL_PROMPT

PAD, UNKNOWN = 0, 1


class WordTokenizer:
    """Captions to rows of a table with `vocab_size` rows, padded or cut to `max_len`."""

    def __init__(self, t5_vocabulary: Sequence[int], max_len: int):
        if max_len < 1:
            raise ValueError(f"{max_len=} must be positive")
        if len(set(t5_vocabulary)) != len(t5_vocabulary):
            raise ValueError("t5_vocabulary names an id twice")
        self.t5_vocabulary = [int(i) for i in t5_vocabulary]
        self.max_len = int(max_len)
        self._row = {t5: row for row, t5 in enumerate(self.t5_vocabulary, start=2)}

    @classmethod
    def from_captions(cls, captions: Iterable[str], max_len: int = 12) -> "WordTokenizer":
        """A table for the pieces of these captions and of the neutral prompt, in T5's order."""
        found = {i for caption in [*captions, NEUTRAL_PROMPT] for i in pieces.ids(caption)}
        return cls(sorted(found), max_len)

    @property
    def vocab_size(self) -> int:
        """Rows of the table, padding and unknown included."""
        return 2 + len(self.t5_vocabulary)

    def rows(self) -> dict[int, int]:
        """The table's row of each id of T5's, padding and unknown as -1 and -2."""
        return {-1: PAD, -2: UNKNOWN} | self._row

    def __call__(self, captions: Sequence[str]) -> Int32[np.ndarray, "B L"]:
        out = np.full((len(captions), self.max_len), PAD, np.int32)
        for row, caption in zip(out, captions, strict=True):
            ids = [self._row.get(i, UNKNOWN) for i in pieces.ids(caption)[: self.max_len]]
            row[: len(ids)] = ids
        return out

    def to_dict(self) -> dict:
        """Plain lists and numbers, for the bundle's json."""
        return {"t5_vocabulary": self.t5_vocabulary, "max_len": self.max_len}

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "words") -> "WordTokenizer":
        """The inverse of `to_dict`. Raises ValueError for a field that is missing or not right.

        `where` names the file in it.
        """
        fields = Fields(values, where)
        ids = fields.integers("t5_vocabulary", 0, pieces.NUM_IDS - 1, most=pieces.NUM_IDS)
        if len(set(ids)) < len(ids):
            fields.refuse("t5_vocabulary", "one that names every id once")
        return cls(ids, fields.integer("max_len", 1, 4096))
