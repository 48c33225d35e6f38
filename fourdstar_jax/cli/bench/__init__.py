"""`fourdstar bench`: an operation a module."""

import argparse

from fourdstar_jax.cli.bench import rasterize, sampling, tokenizer, train
from fourdstar_jax.cli.common import add_command

SUMMARY = "measure the speed of an operation, or what settings of the sampler give"
OPERATIONS = (rasterize, sampling, tokenizer, train)


def add_flags(parser: argparse.ArgumentParser) -> None:
    operations = parser.add_subparsers(metavar="OPERATION", required=True)
    for operation in OPERATIONS:
        add_command(operations, operation)
