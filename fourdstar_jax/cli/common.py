"""What commands share: flags, the model, and how a command becomes a parser."""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourdstar_jax.arguments import SIDE
from fourdstar_jax.shards import Shard

if TYPE_CHECKING:
    from fourdstar_jax.generate import Model

# The model that comes with the package, and the demo's video beside it.
BUNDLED_MODEL = Path(__file__).parents[1] / "models" / "small"
# Of the extra `train`: the name on the package index, and the module.
TRAINING_PACKAGES = {
    "optax": "optax",
    "orbax-checkpoint": "orbax",
    "grain": "grain",
    "array-record": "array_record",
    "tensorflow-datasets": "tensorflow_datasets",
    "importlib_resources": "importlib_resources",
    "transformers": "transformers",
    "tensorboardX": "tensorboardX",
    "moderngl": "moderngl",
}
INSTALL_TRAINING = "pip install 'fourdstar-jax[train]' (in a checkout: launch/setup.sh dev)"
EXIT_BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def __init__(self, *words: Any, **options: Any):
        super().__init__(*words, **options)
        self.register("type", Path, path)
        self._words: list[str] = []

    def parse_known_args(self, args=None, namespace=None):  # pyright: ignore
        self._words = list(args or ())
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        unknown = [
            flag
            for word in self._words
            if re.match("--?[a-zA-Z]", flag := word.partition("=")[0])
            if flag not in self._option_string_actions and not flag.startswith("--config")
        ]
        if unknown and "required" in message:  # the likelier mistake
            message = f"unrecognized arguments: {unknown[0]}"
        if unknown and message.startswith("unrecognized"):
            near = difflib.get_close_matches(unknown[0], self._option_string_actions, 1)
            message += f": did you mean {near[0]}?" if near else ""
        print(f"{self.prog}: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults that say something, and of the bundled model no path."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is x for x in (None, False)) or action.default in ((), [None]):
            return action.help
        if action.default == BUNDLED_MODEL:
            return f"{action.help} (default: the bundled one)"
        return super()._get_help_string(action)


def add_command(commands: Any, module: Any) -> None:
    """Adds a module of this package as a subcommand of its name.

    It has a SUMMARY, `add_flags(parser)`, `run(arguments)` unless it has subcommands, and perhaps a
    DESCRIPTION for its own help.
    """
    summary = module.SUMMARY
    parser = commands.add_parser(
        module.__name__.split(".")[-1].replace("_", "-"),
        help=summary,
        description=getattr(module, "DESCRIPTION", summary[0].upper() + summary[1:] + "."),
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    parser.set_defaults(run=getattr(module, "run", None), parser=parser)
    module.add_flags(parser)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A flag's type: whole numbers of low .. high."""

    def read(text: str) -> int:
        # int() itself takes thousands of digits, blanks and underscores
        if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not low <= int(text) <= high:
            allowed = f"must be a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{allowed}, not {text[:40]!r}")
        return int(text)

    return read


def real(low: float, high: float) -> Callable[[str], float]:
    """A flag's type: numbers of low .. high, and so neither infinite nor NaN."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            allowed = f"must be a number from {low:g} to {high:g}"
            raise argparse.ArgumentTypeError(f"{allowed}, not {text[:40]!r}")
        return value

    return read


def path(text: str) -> Path:
    """What flags of type Path take: not "", which is what a variable that is not set leaves."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not ''")
    return Path(text)


def shard(text: str) -> Shard:
    """A flag's type: part I of N of a list, as "I/N"."""
    try:
        return Shard.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def bundle_folder(text: str) -> Path:
    """A flag's type: a folder, fetched if need be, which is no bundle with impossible sizes.

    That much is told before anything large is imported; `bundle.read` checks the rest.
    """
    from fourdstar_jax import arguments, remote

    try:
        path = remote.fetched(text)
        if (path / "model.json").is_file():
            arguments.check_numbers(path / "model.json")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path


def model_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=bundle_folder, default=BUNDLED_MODEL, metavar="BUNDLE", help="model bundle"
    )


def output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", type=whole(*SIDE), default=256, help="of the videos, pixels a side"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    parser.add_argument(
        "--timing",
        action="store_true",
        help="keep seconds and peak memory in manifest.json, for `evaluate`; it then differs from "
        "run to run",
    )


def load_model(folder: Path) -> "Model":
    """The model of a bundle. Raises ValueError if there is none."""
    there_is_a_bundle(folder)
    from fourdstar_jax import generate

    return generate.load(folder)


def there_is_a_bundle(folder: Path) -> None:
    """Raises ValueError for a folder that is no bundle, before anything large is imported."""
    if folder == BUNDLED_MODEL and not folder.exists():
        raise ValueError(f"this installation has no bundled model ({folder}): give --model BUNDLE")
    if not folder.exists():
        raise ValueError(f"{folder} is not a model bundle: there is no such folder")
    if not (folder / "model.json").is_file():
        raise ValueError(f"{folder} is not a model bundle: it has no model.json")


def say_device() -> None:
    import jax

    device = jax.devices()[0]
    print(f"device: {device.platform} ({device.device_kind}), {jax.device_count()} there")


def say_input(path: Path, info: dict[str, Any], *, fit: str) -> None:
    """Says what of a video or picture is used, from `data.video.read_video`; warnings to stderr."""
    from fourdstar_jax.data import video

    for line in video.described(info, fit=fit):
        if line.startswith("warning: "):
            print(f"warning: {path}: {line.removeprefix('warning: ')}", file=sys.stderr)
        else:
            print(f"{path}: {line}")


def say_viewer(folder: Path) -> None:
    """Says which file of an output plays it."""
    from fourdstar_jax.export import page

    path = folder / page.NAME
    if path.is_file():
        print(f"open in a browser: {path.resolve()}")
    else:
        print(f"{page.NAME} would be over {page.MAX_BYTES >> 20} MB: fourdstar view {folder}")
