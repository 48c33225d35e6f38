"""`fourdstar encode-text`: a dataset's captions to features of a text encoder."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import bundle_folder, whole

SUMMARY = "encode the captions of a dataset with a bundle's text encoder"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    parser.add_argument(
        "--bundle", type=bundle_folder, required=True, metavar="DIR", help="has the encoder"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        default="bfloat16",
        help="in which the features are kept",
    )
    parser.add_argument("--batch", type=whole(1, 1 << 16), default=8, help="captions at once")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.train import encode

    encode.prepare_features(
        arguments.data,
        arguments.bundle,
        arguments.out,
        dtype=arguments.dtype,
        batch=arguments.batch,
        overwrite=arguments.overwrite,
    )
