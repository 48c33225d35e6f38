"""`fourdstar bench tokenizer`: UniTok's speed."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import bundle_folder, there_is_a_bundle, whole

SUMMARY = "time UniTok on random images, images to tokens and back"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size", choices=["released", "tiny"], help="of random weights; default released"
    )
    parser.add_argument("--bundle", type=bundle_folder, metavar="DIR", help="its tokenizer instead")
    parser.add_argument("--batch", type=whole(1, 1 << 16), default=64, metavar="N", help="images")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="default bfloat16, or as in the bundle"
    )
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="a checkout of the original UniTok, timed too"
    )
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="that runs the original; default this one"
    )
    parser.add_argument(
        "--layouts",
        nargs="+",
        metavar="NAME",
        help="of the original's arrays, the fastest is reported; default contiguous channels_last",
    )
    parser.add_argument("--repeats", type=whole(1, 10**6), default=20, metavar="N", help="calls")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results as JSON")
    parser.add_argument("--commit", help="of the code, for the results; default git's")


def run(arguments: argparse.Namespace) -> None:
    if arguments.bundle is not None:
        for name in ("size", "dtype"):
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} is what --bundle says: give one of the two")
        there_is_a_bundle(arguments.bundle)
    from fourdstar_jax import bundle
    from fourdstar_jax.tokenizer import bench

    def load():
        return bundle.read(arguments.bundle).load("tokenizer")

    bench.run(
        size=arguments.size or "released",
        load=None if arguments.bundle is None else load,
        batch=arguments.batch,
        dtype=arguments.dtype or "bfloat16",
        repeats=arguments.repeats,
        against=arguments.against,
        python=arguments.python,
        layouts=arguments.layouts,
        json_file=arguments.json,
        commit=arguments.commit,
    )
