"""T5's word pieces: captions to ids, in lower case and without surrounding blanks.

LlamaGen and MVAR clean their captions further (links, markup, article numbers of web captions). Of
captions made from names (`text.captions`) that cleaning leaves exactly this, so we leave it out.
The tokenizer file is T5's (Apache-2.0, Google), gzipped beside this file.
"""

import functools
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

PAD, END = 0, 1
NUM_IDS = 32_128  # T5's, its spare ones included
LENGTH = 120  # tokens, LlamaGen's and MVAR's
TOKENIZER_FILE = Path(__file__).parent / "t5_tokenizer.json.gz"


@functools.cache
def tokenizer():
    """T5's SentencePiece model as a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(gzip.decompress(TOKENIZER_FILE.read_bytes()).decode())
    found.no_padding()
    found.no_truncation()
    return found


def ids(text: str) -> list[int]:
    """T5's ids without the end mark, of the text in lower case."""
    return tokenizer().encode(text.lower().strip(), add_special_tokens=False).ids


def tokenize(
    texts: Sequence[str], length: int = LENGTH
) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """T5's ids of the texts in lower case with the end mark, cut and padded, and where they are.

    Raises ValueError for a length below 1.
    """
    if length < 1:
        raise ValueError(f"{length=} must be positive")
    rows = np.full((len(texts), length), PAD, np.int32)
    mask = np.zeros(rows.shape, bool)
    for row, seen, text in zip(rows, mask, texts, strict=True):
        found = [*ids(text)[: length - 1], END]
        row[: len(found)], seen[: len(found)] = found, True
    return rows, mask
