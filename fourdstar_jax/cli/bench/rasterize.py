"""`fourdstar bench rasterize`: the rasterizer's speed."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import whole

SUMMARY = "time the rasterizer on random scenes, forward and backward"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "scenes", nargs="*", default=["tiny"], metavar="SCENE", help="tiny small16k S A B C D E F H"
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help="of rasterize; by default the best here",
    )
    parser.add_argument("--against", choices=["gsplat"], help="the same scenes with this, too")
    parser.add_argument(
        "--repeats", type=whole(1, 10**6), metavar="N", help="calls; default the scene's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results as JSON")
    parser.add_argument("--commit", help="of the code, for the results; default git's")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing, print results as Markdown"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.table is not None and not arguments.table.is_file():
        raise ValueError(f"{arguments.table} does not exist")
    from fourdstar_jax.kernels.rasterize import bench, bench_table

    if arguments.table is not None:
        print(bench_table.table(arguments.table), end="")
        return
    bench.run(
        arguments.scenes,
        implementations=arguments.implementations,
        repeats=arguments.repeats,
        against=arguments.against,
        json_file=arguments.json,
        commit=arguments.commit,
    )
