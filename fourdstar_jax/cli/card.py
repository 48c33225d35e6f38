"""`fourdstar card`: the model card of a bundle."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import BUNDLED_MODEL, bundle_folder, there_is_a_bundle

SUMMARY = "write the model card of a bundle"
DESCRIPTION = """Write a bundle's model card as Markdown: its limits first, data, training, figures
with intervals, files. What no file tells stands in BUNDLE/notes.md: limits, then sections of your
own (data and licences, commands, time and hardware)."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=bundle_folder, nargs="?", default=BUNDLED_MODEL, help="model bundle"
    )
    parser.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="what `fourdstar evaluate --out` wrote",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="its dataset, for the counts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="instead of printing it")


def run(arguments: argparse.Namespace) -> None:
    there_is_a_bundle(arguments.bundle)
    from fourdstar_jax.evaluate import card
    from fourdstar_jax.folders import replace_file

    text = card.card(arguments.bundle, results=arguments.results, data=arguments.data)
    if arguments.out is None:
        print(text, end="")
    else:
        replace_file(arguments.out, text.encode())
