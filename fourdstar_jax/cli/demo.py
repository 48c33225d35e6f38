"""`fourdstar demo`: `fourdstar generate` with the model and the video of this package."""

import argparse
from pathlib import Path

from fourdstar_jax.cli import generate
from fourdstar_jax.cli.common import BUNDLED_MODEL

SUMMARY = "make an object of the video that comes with the package"
DESCRIPTION = """Do what `fourdstar generate` does with the model and the video that come with this
package, and write viewer.html, which plays the object in a browser."""
EXAMPLE = BUNDLED_MODEL / "example.mp4"


def add_flags(parser: argparse.ArgumentParser) -> None:
    generate.other_flags(parser)
    # The example has the training images' framing already.
    parser.set_defaults(video=EXAMPLE, image=None, out=Path("out/demo"), fit="none")
    parser.set_defaults(videos=None, shard=None, retry=False)


def run(arguments: argparse.Namespace) -> None:
    if not EXAMPLE.is_file():
        raise ValueError(f"this installation has no example video ({EXAMPLE})")
    generate.run(arguments)
