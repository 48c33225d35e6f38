"""Arguments, checked before anything is built.

Those of functions that users call, and a module's constructor arguments from JSON or a config.
"""

import functools
import inspect
import math
import operator
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fourdstar_jax import outside
from fourdstar_jax.outside import MAX_SEED, Fields

# What users may ask for, first and last: the command's flags and the functions take the same.
SEEDS = (0, MAX_SEED)
TIMESTEPS = (1, 1 << 16)
TEMPERATURES = (0, 1000)
TOP_K = (1, 1 << 20)
GUIDANCE = (-1000, 1000)
START_S = (0, 1e6)  # of a clip, seconds
FPS = (1e-3, 1000)
FRAMES = (1, 10**7)  # of a file, at most
BATCH = (1, 1 << 16)  # pictures at a time
RESOLUTION = (1, 4096)  # of what a tokenizer sees, pixels a side
SIDE = (16, 2048)  # of pictures and videos that are written, pixels
FITS = ("object", "none", "crop")
DTYPES = ("float32", "bfloat16", "float16")
MAX_JSON = 16 << 20  # bytes of a bundle's description
MAX_LIST = 12  # entries of a list of widths, each of which doubles or halves a size
# Whole numbers by the end of the argument's name, the first that fits; others lie in DIMS.
DIMS = (1, 1 << 16)
RANGES = {
    "layers": (1, 96),
    "blocks": (1, 96),
    "depths": (0, 32),
    "octaves": (0, 64),
    "heads": (1, 1024),
    "multipliers": (1, 64),
    "resolution": RESOLUTION,
    "grid": (1, 512),
    "text_vocab": (0, 1 << 20),
    "vocab_size": (1, 1 << 20),
    "max_distance": (1, 1 << 20),
    "slots": (1, 1 << 20),
    "blank_code": (0, 1 << 20),
}
# Other numbers, which JSON may write as 0 or 1.
NOT_WHOLE = ("commitment", "container_place", "dropout", "init_std")


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """A whole number of low .. high, an array's as well. Raises ValueError, which names it."""
    if _kind(value) not in "iu" or not low <= value <= high:
        allowed = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name}={shown(value)} must be a whole number {allowed}")
    return operator.index(value)


def real(name: str, value: Any, low: float, high: float) -> float:
    """A number of low .. high, an array's as well. Raises ValueError, which names it."""
    if _kind(value) not in "iuf" or not low <= value <= high:
        raise ValueError(f"{name}={shown(value)} must be a number from {low:g} to {high:g}")
    return float(value)


def choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of some words. Raises ValueError, which names it."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name}={shown(value)} must be one of {', '.join(allowed)}")
    return value


def path(name: str, value: Any) -> Path:
    """The path of a file or folder. Raises ValueError, which names it."""
    known = isinstance(value, str | os.PathLike) and not isinstance(os.fspath(value), bytes)
    if not known or value == "":  # which would be the current folder
        raise ValueError(f"{name}={shown(value)} must be a path")
    return Path(value)


def _kind(value: Any) -> str:
    """NumPy's letter for the kind of a number, "?" for anything else."""
    match value:
        case bool():
            return "?"
        case int():
            return "i"
        case float():
            return "f"
    return value.dtype.kind if getattr(value, "shape", None) == () else "?"


def there(path: Path) -> Path:
    """A path, if something is there. Raises ValueError, which tells URLs."""
    if not path.exists():
        url = re.fullmatch(r"([a-z][a-z0-9]+):/+(.+)", str(path))  # `Path` makes one slash of two
        wrong = f"{url[1]}://{url[2]} is a URL: download it first" if url else None
        raise ValueError(wrong or f"{path} does not exist")
    return path


def counted(count: int, things: str) -> str:
    """So many things in words: "1 timestep", "2 timesteps"."""
    return f"{count} {things if count != 1 else things.removesuffix('s')}"


def shown(value: Any) -> str:
    """A value as an error shows it."""
    if getattr(value, "shape", ()):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:56] + " ..."


def check(module: type, values: Mapping[str, Any], where: str, path: str = "") -> None:
    """Raises ValueError for arguments that `module` does not take, by its annotations, and RANGES.

    What JSON cannot hold (arrays, random keys) is not looked at.
    """
    fields = Fields(dict(values), where, path)
    known = _parameters(module)
    fields.only(known)
    for name, parameter in known.items():
        if name not in fields:
            if parameter.default is inspect.Parameter.empty:
                fields.refuse(name, "given")
        elif fields.values[name] is not None or parameter.default is not None:
            _check(fields, name, parameter.annotation)


def check_numbers(path: str | os.PathLike[str]) -> None:
    """What can be told of a bundle's description at once: its JSON and the sizes in it.

    Commands call it before they import anything large. Raises ValueError as `check` does.
    """
    stages = outside.read(path, max_bytes=MAX_JSON).part("stages")
    for stage in stages:
        model = stages.part(stage).part("model")
        for name, value in model.values.items():
            if name in NOT_WHOLE or isinstance(value, bool):
                continue
            if isinstance(value, int):
                model.integer(name, *_range(name))
            elif name == "dtype":
                model.text(name, choices=DTYPES)


def _range(name: str) -> tuple[int, int]:
    return next((found for end, found in RANGES.items() if name.endswith(end)), DIMS)


@functools.cache
def _parameters(module: type) -> dict[str, inspect.Parameter]:
    """The parameters of the constructor besides `rngs` and arrays."""
    return {
        name: parameter
        for name, parameter in inspect.signature(module.__init__).parameters.items()
        if name not in ("self", "rngs", "codebooks")
    }


def _check(fields: Fields, name: str, annotation: Any) -> None:
    low, high = _range(name)
    options = typing.get_args(annotation)
    if isinstance(annotation, types.UnionType) and type(None) in options:
        annotation = next(option for option in options if option is not type(None))
    if name == "dtype":
        if not isinstance(fields.values[name], str):  # a dtype itself, from Python
            return
        fields.text(name, choices=DTYPES)
    elif annotation is bool:
        fields.flag(name)
    elif annotation is int:
        fields.integer(name, low, high)
    elif annotation is float:
        fields.number(name, -1e6, 1e6)
    elif typing.get_origin(annotation) is Literal:
        fields.text(name, choices=options)
    elif annotation == Sequence[float]:
        fields.numbers(name, -1e6, 1e6, most=MAX_LIST)
    elif typing.get_origin(annotation) is Sequence:
        fields.integers(name, low, high, most=MAX_LIST)
    elif annotation is str:
        fields.text(name)
    else:
        raise TypeError(f"{name}: {annotation} is nothing that JSON holds")
