"""JSON that anybody may have written: read with limits, its fields taken with their types checked.

Every manifest, index and description that a command reads comes through here, so that a bad one
ends in one line that names the file, the field, what was found and what is allowed.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 64 << 20
MAX_VALUES = 2_000_000  # commas, each of which may stand between two values
MAX_DEPTH = 64  # lists and objects in one another
MAX_INTEGER = 1 << 64
MAX_SEED = (1 << 32) - 1  # of a random generator
SHA256 = r"[0-9a-f]{64}"
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.S)
_OTHER = re.compile(rb"[^\[\]{}]+")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def read(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> "Fields":
    """The object in a JSON file. Raises ValueError, which names the file, if there is none."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return Fields(parse(data, str(path), max_bytes=max_bytes), str(path))


def parse(
    data: bytes,
    where: str,
    *,
    max_bytes: int = MAX_BYTES,
    max_values: int = MAX_VALUES,
    lenient: bool = False,
) -> Any:
    """The value of a JSON text in UTF-8; `where` names it in errors.

    Nothing is built before size and depth are known. Names that occur twice, NaN, Infinity and
    numbers that 64 bits do not hold are refused, unless `lenient`. Raises ValueError.
    """
    if len(data) > max_bytes:
        raise ValueError(f"{where} is larger than {max_bytes} bytes")
    if data.count(b",") > max_values:
        raise ValueError(f"{where} holds more than {max_values} values")
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        steps = map(_STEP.__getitem__, _OTHER.sub(b"", _STRING.sub(b"", data)))
        if any(depth > MAX_DEPTH for depth in itertools.accumulate(steps)):
            raise ValueError(f"{where} is nested more than {MAX_DEPTH} deep")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{where} holds {_shown(twice)} twice in one object")
        return found

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{where} holds {text}, which is no number of JSON")

    def number(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{where} holds the number {text[:40]}, which 64 bits do not hold")
        return value

    def integer(text: str) -> int:
        if len(text) <= 21 and -MAX_INTEGER < (value := int(text)) < MAX_INTEGER:
            return value
        raise ValueError(f"{where} holds the number {text[:40]}, which 64 bits do not hold")

    checks: dict[str, Any] = {"object_pairs_hook": once, "parse_constant": constant}
    checks |= {"parse_float": number, "parse_int": integer}
    try:
        value = json.loads(data.decode("utf-8"), **({} if lenient else checks))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not JSON: its byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if b"\\ud" in data or b"\\uD" in data:  # half of a pair is no text, and cannot be printed
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{where} holds half of a surrogate pair") from error
    return value


class Fields:
    """A JSON object whose fields are taken one by one, each with what it may be.

    `where` names its file, `path` its place in it. Every method raises ValueError for a field that
    is missing or is something else; with a default, a field that is missing or null is that.
    """

    def __init__(self, values: Any, where: str, path: str = ""):
        if not isinstance(values, dict):
            place = f"{where}: {path}" if path else where
            raise ValueError(f"{place} holds {_shown(values)}, not a JSON object")
        self.values: dict[str, Any] = values
        self.where, self.path = where, path

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def refuse(self, name: str, allowed: str) -> NoReturn:
        """Raises ValueError about one field."""
        place = f"{self.where}: {self._place(name)}"
        if name not in self.values:
            raise ValueError(f"{place} is missing: it must be {allowed}")
        raise ValueError(f"{place} must be {allowed}, not {_shown(self.values[name])}")

    def only(self, names: Iterable[str]) -> None:
        """Nothing besides fields of these names."""
        names = set(names)
        for name in self.values:
            if name not in names:
                place = self._place(_shown(name)[1:-1])
                known = ", ".join(sorted(names))
                raise ValueError(f"{self.where}: {place} is an unknown field; there are {known}")

    def part(self, name: str, *, default: dict[str, Any] | None = None) -> "Fields":
        """An object in the object."""
        value = self._get(name, default)
        if not isinstance(value, dict):
            self.refuse(name, "a JSON object")
        return Fields(value, self.where, self._place(name))

    def text(
        self,
        name: str,
        *,
        choices: Sequence[str] = (),
        pattern: str = "",
        default: str | None = None,
    ) -> str:
        """A string: one of `choices`, or one that the whole `pattern` matches."""
        value = self._get(name, default)
        if choices and not (isinstance(value, str) and value in choices):
            self.refuse(name, " or ".join(choices))
        if not isinstance(value, str) or (pattern and not re.fullmatch(pattern, value)):
            self.refuse(name, f"a text like {pattern}" if pattern else "a text")
        return value

    def flag(self, name: str, *, default: bool | None = None) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def integer(self, name: str, low: int, high: int, *, default: int | None = None) -> int:
        """A whole number of low .. high."""
        value = self._get(name, default)
        if not _is_integer(value, low, high):
            self.refuse(name, f"a whole number from {low} to {high}" if low < high else str(low))
        return value

    def number(self, name: str, low: float, high: float, *, default: float | None = None) -> float:
        """A number of low .. high."""
        value = self._get(name, default)
        if not _is_number(value, low, high):
            self.refuse(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        values = self._get(name, None)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            self.refuse(name, "a list of texts")
        return values

    def integers(self, name: str, low: int, high: int, *, most: int) -> list[int]:
        """A list of at most `most` whole numbers of low .. high."""
        values = self._get(name, None)
        fits = isinstance(values, list | tuple) and len(values) <= most
        if not fits or not all(_is_integer(v, low, high) for v in values):
            self.refuse(name, f"a list of at most {most} whole numbers from {low} to {high}")
        return list(values)

    def numbers(self, name: str, low: float, high: float, *, most: int) -> list[float]:
        """A list of 1 to `most` numbers of low .. high."""
        values = self._get(name, None)
        fits = isinstance(values, list | tuple) and 1 <= len(values) <= most
        if not fits or not all(_is_number(v, low, high) for v in values):
            self.refuse(name, f"a list of 1 to {most} numbers from {low:g} to {high:g}")
        return [float(value) for value in values]

    def parts(self, name: str) -> list["Fields"]:
        """A list of objects."""
        values = self._get(name, None)
        if not isinstance(values, list):
            self.refuse(name, "a list")
        return [Fields(v, self.where, f"{self._place(name)}[{i}]") for i, v in enumerate(values)]

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def _place(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _is_integer(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_number(value: Any, low: float, high: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and low <= value <= high


def _shown(value: Any) -> str:
    """A value as an error shows it: in one line, short, without anything that a terminal obeys."""
    match value:
        case dict():
            return f"an object of {len(value)} fields"
        case list() if len(value) > 4:
            return f"a list of {len(value)}"
        case None:
            return "null"
        case bool():
            return str(value).lower()
    text = ascii(value)
    return text if len(text) <= 60 else text[:56] + " ..."
