"""The small word table: T5's pieces numbered by what occurs in the captions."""

import json

import numpy as np
import pytest

from fourdstar_jax.text import pieces, words
from fourdstar_jax.text.captions import NEUTRAL_PROMPT


def test_pieces_are_those_of_t5():
    """The example of Hugging Face's T5 documentation, without its end mark."""
    text = "translate English to German: The house is wonderful."
    expected = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5]
    assert pieces.tokenizer().encode(text, add_special_tokens=False).ids == expected
    assert pieces.ids("  Translate ") == expected[:1]
    assert pieces.ids("") == []
    assert pieces.tokenizer().get_vocab_size() == 32100


def test_rows_pad_cut_and_know_what_is_unknown():
    table = words.WordTokenizer.from_captions(["a bull, eating", "a fox, gallop jump"], 7)
    out = table(["a bull, eating", "a zebra, eating", "", "a fox, gallop jump gallop jump"])
    assert out.shape == (4, 7) and out.dtype == np.int32
    assert (out[2] == words.PAD).all() and (out[3] > words.UNKNOWN).all()
    assert words.UNKNOWN in out[1] and words.UNKNOWN not in out[0]
    assert out.max() < table.vocab_size
    assert (words.WordTokenizer.from_captions([], 12)([NEUTRAL_PROMPT]) != words.UNKNOWN).all()
    np.testing.assert_array_equal(table(["A BULL, Eating"]), out[:1])


def test_the_order_of_captions_does_not_matter():
    captions = ["a bull, eating", "a fox, gallop", "a wasp, death"]
    a = words.WordTokenizer.from_captions(captions, 5)
    assert a.to_dict() == words.WordTokenizer.from_captions(captions[::-1], 5).to_dict()


def test_the_vocabulary_travels_as_json():
    table = words.WordTokenizer.from_captions(["a bull, eating"], 6)
    again = words.WordTokenizer.from_dict(json.loads(json.dumps(table.to_dict())))
    text = ["a bull, sleeping", NEUTRAL_PROMPT]
    np.testing.assert_array_equal(table(text), again(text))
    assert again.vocab_size == table.vocab_size


def test_wrong_calls_name_the_argument():
    with pytest.raises(ValueError, match="max_len=0"):
        words.WordTokenizer([5], 0)
    with pytest.raises(ValueError, match="twice"):
        words.WordTokenizer([5, 5], 3)
    with pytest.raises(ValueError, match="words: t5_vocabulary is missing"):
        words.WordTokenizer.from_dict({"max_len": 3})
