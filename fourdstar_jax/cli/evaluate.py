"""`fourdstar evaluate`: a bundle on unseen clips."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import load_model, model_flag

SUMMARY = "measure a bundle on the unseen clips of a dataset, with intervals"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    parser.add_argument("--split", default="unseen_clip", help="unseen_clip or unseen_object")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the figures as JSON")
    model_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    import json

    from fourdstar_jax.evaluate import unseen
    from fourdstar_jax.folders import replace_file

    load_model(arguments.model)  # says what is wrong with it before the data is read
    text = json.dumps(unseen.evaluate(arguments.model, arguments.data, arguments.split), indent=1)
    print(text)
    if arguments.out is not None:
        replace_file(arguments.out, f"{text}\n".encode())
