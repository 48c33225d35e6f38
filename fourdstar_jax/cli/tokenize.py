"""`fourdstar tokenize`: a dataset to tokens, which STAR is trained on."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import bundle_folder

SUMMARY = "encode the views of a dataset with a bundle's tokenizer"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    parser.add_argument(
        "--bundle", type=bundle_folder, required=True, metavar="DIR", help="has a tokenizer"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.train import encode

    encode.prepare_tokens(
        arguments.data, arguments.bundle, arguments.out, overwrite=arguments.overwrite
    )
