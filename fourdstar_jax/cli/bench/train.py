"""`fourdstar bench train`: the speed of training steps."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import whole
from fourdstar_jax.cli.train import read_config

SUMMARY = "time training steps and their parts, on random weights and made data"
DESCRIPTION = """
Time training steps and their parts, on random weights and made data. Any value of the stage's
config can be overridden: --config.model.up_pictures=32.
"""
STAGES = ("vqvae", "star")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_overrides=True)
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help=" ".join(STAGES))
    parser.add_argument(
        "--size", choices=["tiny", "small", "base", "paper"], default="tiny", help="of the config"
    )
    parser.add_argument(
        "--batch", type=whole(1, 1 << 16), default=1, metavar="N", help="objects a step"
    )
    parser.add_argument(
        "--views", type=whole(1, 64), metavar="N", help="of the rig; 8 at size paper, else 4"
    )
    parser.add_argument(
        "--devices", type=whole(1, 1 << 10), default=1, metavar="N", help="for star"
    )
    parser.add_argument(
        "--parts", nargs="*", metavar="NAME", help="what to time beside the step; default all"
    )
    parser.add_argument(
        "--ablations",
        action="store_true",
        help="for star: time the steps of the paper's Table 4 in turn, on one device, no parts",
    )
    parser.add_argument(
        "--repeats", type=whole(1, 10**6), default=10, metavar="N", help="timed steps"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the results as JSON")
    parser.add_argument("--commit", help="of the code, for the results; default git's")


def run(arguments: argparse.Namespace) -> None:
    if arguments.ablations:
        compare(arguments)
        return
    config = read_config(f"configs/{arguments.stage}.py:{arguments.size}", arguments.overrides)
    common = dict(
        size=arguments.size,
        objects=arguments.batch,
        views=arguments.views,
        repeats=arguments.repeats,
        parts=arguments.parts,
        json_file=arguments.json,
        commit=arguments.commit,
    )
    if arguments.stage == "star":
        from fourdstar_jax.train import bench_star

        bench_star.run(config, devices=arguments.devices, **common)
        return
    if arguments.devices != 1:
        raise ValueError("--devices is for star: the VQ-VAE's step is timed on one")
    tokenizer = read_config(f"configs/tokenizer.py:{arguments.size}", [])
    from fourdstar_jax.train import bench

    bench.run(config, tokenizer.model.to_dict(), **common)


def compare(arguments: argparse.Namespace) -> None:
    """Times STAR's ablations. Raises ValueError with what they do not go with."""
    if arguments.stage != "star" or arguments.devices != 1 or arguments.parts is not None:
        raise ValueError("--ablations are of star, on one device, and have no --parts")
    from fourdstar_jax.train import bench_star

    configs = {
        name or "ours": read_config(
            f"configs/star.py:{arguments.size}{name and ',' + name}", arguments.overrides
        )
        for name in ("baseline", "average", "merging", "explicit", "")
    }
    bench_star.compare(
        configs,
        size=arguments.size,
        objects=arguments.batch,
        views=arguments.views,
        repeats=arguments.repeats,
        json_file=arguments.json,
        commit=arguments.commit,
    )
