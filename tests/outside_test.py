"""JSON of others: what is not right ends in one line that names the file and the field."""

import json
import time

import pytest

from fourdstar_jax import arguments, outside
from fourdstar_jax.star.model import STAR
from fourdstar_jax.tokenizer.unitok import UniTok

pytestmark = pytest.mark.central

BAD_TEXTS = {
    "": "not JSON",
    "{": "not JSON",
    "[1]": "not a JSON object",
    "null": "not a JSON object",
    '{"a": 1, "a": 2}': "'a' twice",
    '{"a": NaN}': "NaN",
    '{"a": -Infinity}': "-Infinity",
    '{"a": 1e999}': "1e999, which 64 bits",
    '{"a": ' + "9" * 5000 + "}": "64 bits",
    "[" * 200_000: "nested more than 64 deep",
    '{"a":' * 200_000: "nested more than 64 deep",
    '{"a": "\\ud800"}': "surrogate",
    '{"a": [' + "1," * 2_000_001 + "1]}": "more than 2000000 values",
}


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: BAD_TEXTS[text])
def test_texts_that_are_refused(tmp_path, text):
    file = tmp_path / "manifest.json"
    file.write_text(text)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=BAD_TEXTS[text]) as error:
        outside.read(file)
    assert time.perf_counter() - start < 2
    assert str(error.value).startswith(str(file)) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_size_bytes_and_missing_files(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.json is not JSON: its byte 7 is not UTF-8"):
        outside.read(file)
    with pytest.raises(ValueError, match=r"a\.json is larger than 9 bytes"):
        outside.read(file, max_bytes=9)
    with pytest.raises(ValueError, match=r"b\.json cannot be read: No such file"):
        outside.read(tmp_path / "b.json")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        outside.read(tmp_path)


def test_what_is_valid_is_read_as_it_is():
    """Brackets and quotes in strings are text; a deep list of 64 and the ends of 64 bits are in."""
    value = {"a": '[{"\\' * 100, "b": [1 << 63, -(1 << 63), 0.5, -1e300, None, True], "ü": "🦊"}
    value["deep"] = json.loads("[" * 63 + "]" * 63)
    assert outside.parse(json.dumps(value).encode(), "here") == value
    assert outside.parse(json.dumps(value, ensure_ascii=False).encode(), "here") == value


def test_lenient_reading_keeps_the_limits():
    """Of glTF, whose viewers are: numbers are checked where they are used."""
    found = outside.parse(b'{"a": 1, "a": 2, "b": 1e999}', "a", lenient=True)
    assert found == {"a": 2, "b": float("inf")}
    with pytest.raises(ValueError, match="64 deep"):
        outside.parse(b"[" * 9000, "a", lenient=True)


def test_fields_say_where_they_stand():
    text = '{"a": {"b": [{"n": 3}, {"n": true}], "t": "x", "f": 1.5, "l": [1, 2, "3"]}, "z": null}'
    fields = outside.Fields(json.loads(text), "f.json")
    part = fields.part("a")
    first, second = part.parts("b")
    assert first.integer("n", 0, 3) == 3 and part.number("f", 1, 2) == 1.5
    assert fields.integer("z", 0, 1, default=1) == fields.integer("y", 0, 1, default=1) == 1
    for call, words in [
        (lambda: first.integer("n", 0, 2), "a.b[0].n must be a whole number from 0 to 2, not 3"),
        (
            lambda: second.integer("n", 0, 2),
            "a.b[1].n must be a whole number from 0 to 2, not tr",
        ),
        (lambda: part.integers("l", 0, 5, most=3), "a.l must be a list of at most 3 whole"),
        (lambda: part.text("t", choices=["y", "z"]), "a.t must be y or z, not 'x'"),
        (lambda: part.text("s"), "a.s is missing: it must be a text"),
        (lambda: part.flag("f"), "a.f must be true or false, not 1.5"),
        (lambda: fields.part("z"), "z must be a JSON object, not null"),
        (lambda: part.only(["b", "t"]), "a.f is an unknown field; there are b, t"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value).startswith("f.json: " + words)


SIZES = dict(
    num_codebooks=2, vocab_size=11, code_dim=6, resolution=8, grid=2, dim=16, num_layers=1,
    num_heads=2, head_dim=8, head_layers=1, head_heads=2, container_slots=2,
    container_neighbors=1, text_length=3, dtype="float32",
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_layers": 3_000_000}, "model.num_layers must be a whole number from 1 to 96"),
        ({"dim": 0}, "model.dim must be a whole number from 1 to 65536, not 0"),
        ({"dim": True}, "not true"),
        ({"dim": 1e3}, r"not 1000\.0"),
        ({"dim": None}, "not null"),
        ({"dtype": "foo"}, "model.dtype must be float32 or bfloat16 or float16, not 'foo'"),
        ({"rope": "radial"}, "model.rope must be none or axial, not 'radial'"),
        ({"dropout": "0"}, "model.dropout must be a number"),
        ({"remat": 1}, "model.remat must be true or false, not 1"),
        ({"colour": 1}, "model.colour is an unknown field; there are "),
    ],
)  # fmt: skip
def test_arguments_are_bounded_before_anything_is_built(change, words):
    arguments.check(STAR, SIZES | {"hidden_dim": None}, "model.json", "model")
    with pytest.raises(ValueError, match=words):
        arguments.check(STAR, SIZES | change, "model.json", "model")


def test_missing_arguments_and_lists():
    with pytest.raises(ValueError, match=r"f: num_codebooks is missing"):
        arguments.check(STAR, {}, "f")
    with pytest.raises(ValueError, match=r"stem_channels must be a list of at most 12"):
        arguments.check(UniTok, {"resolution": 64, "stem_channels": [1] * 13}, "f")


def test_every_reader_takes_damage(tmp_path):
    """`python -m tests.outside_fuzz` does it for as long as one likes."""
    from tests import outside_fuzz

    sources = outside_fuzz.made(tmp_path)
    assert list(outside_fuzz.faults(sources, seed=0, rounds=60)) == []
