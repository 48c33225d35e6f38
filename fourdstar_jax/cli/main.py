"""The `fourdstar` command: a module of this package a subcommand.

Only argparse is imported before a subcommand runs; each imports what it needs then. Input that
cannot be used ends with one line on stderr and exit code 2.
"""

import argparse
import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fourdstar_jax
from fourdstar_jax import signals
from fourdstar_jax.cli import (
    bench,
    card,
    convert,
    demo,
    doctor,
    encode_text,
    evaluate,
    export,
    generate,
    inspect,
    pack,
    prepare,
    reconstruct,
    tokenize,
    train,
    view,
)
from fourdstar_jax.cli.common import (
    EXIT_BAD_INPUT,
    INSTALL_TRAINING,
    TRAINING_PACKAGES,
    Parser,
    add_command,
)

# The machine's, whatever file they are about: full disk, quota, too many files, no memory.
MACHINE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM, errno.EROFS}
# In the order of --help.
COMMANDS = (
    demo,
    generate,
    reconstruct,
    view,
    export,
    train,
    pack,
    prepare,
    tokenize,
    encode_text,
    evaluate,
    convert,
    inspect,
    card,
    bench,
    doctor,
)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    argv = sys.argv[1:] if argv is None else argv
    arguments, extra = parser.parse_known_args(argv)
    if extra and not getattr(arguments, "takes_overrides", False):
        arguments.parser.error(f"unrecognized arguments: {' '.join(extra)}")
    arguments.overrides = extra
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be in no encoding's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    with signals.ending(), _warnings_in_a_line():
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    """The exit code of a command, after one line about what it could not use."""
    try:
        arguments.run(arguments)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        if not _ours(error):
            raise
        return _refuse(error)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in TRAINING_PACKAGES.values():
            raise
        print(
            f"fourdstar: {error.name} is missing, which training needs: {INSTALL_TRAINING}",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno not in MACHINE_ERRORS:
            raise
        place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return _refuse(f"{place}{error.strerror}")
    return 0


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """This package's own warnings look as those about inputs do; others as Python shows them."""
    package, as_before = Path(fourdstar_jax.__file__).parent, warnings.formatwarning

    def formatted(message: Any, category: Any, filename: str, *place: Any) -> str:
        if Path(filename).is_relative_to(package):
            return f"warning: {message}\n"
        return as_before(message, category, filename, *place)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = as_before


def _refuse(reason: object) -> int:
    print(f"fourdstar: {' '.join(str(reason).split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def _ours(error: BaseException) -> bool:
    """Whether this package raised it as a check, rather than some library by surprise."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return name.split(".")[0] in ("fourdstar_jax", "__main__") or name.endswith("_config")


def make_parser() -> Parser:
    """The whole command, with all subcommands."""
    parser = Parser(
        prog="fourdstar",
        description="4DSTAR in JAX: a video goes in, 3D Gaussians that move come out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"fourdstar_jax {fourdstar_jax.__version__}"
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        add_command(commands, command)
    return parser
