"""`fourdstar pack`: a run's state as files of a limited size, and back."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import whole

SUMMARY = "pack a training run to go on elsewhere, or unpack it"
DESCRIPTION = """
Write what goes on from a run's newest sound checkpoint to OUT, as numbered files and a manifest
with their SHA-256: weights, their average, moments, step and place in the data, every bit of it;
the log; the best weights so far. --reverse makes a run of them, new, with every file checked;
`fourdstar train` with that --workdir goes on where the packed one was. It must not be saving
meanwhile.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", type=Path, metavar="FROM", help="the run, a --workdir; or what was packed"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder")
    parser.add_argument("--reverse", action="store_true", help="from the packed FROM to a run")
    parser.add_argument(
        "--part_size", type=whole(1, 1024), default=16, metavar="MIB", help="of a file, at most"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what was packed before")


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax.train import packed

    if arguments.reverse and arguments.overwrite:
        raise ValueError("--overwrite is for packing: a run is never replaced")
    if arguments.reverse:
        manifest = packed.unpack(arguments.source, arguments.out)
    else:
        manifest = packed.pack(
            arguments.source,
            arguments.out,
            part_bytes=arguments.part_size << 20,
            overwrite=arguments.overwrite,
        )
    size = sum(file["bytes"] for file in manifest["files"]) / 1e6
    print(
        f"step {manifest['step']}, {size:.1f} MB in {len(manifest['parts'])} parts: {arguments.out}"
    )
