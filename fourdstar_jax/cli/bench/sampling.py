"""`fourdstar bench sampling`: what the sampler's settings give."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import model_flag, real, whole

SUMMARY = "compare temperatures, top-k and guidance on unseen clips"


def _top_k(text: str) -> int | None:
    return None if text == "all" else whole(1, 1 << 20)(text)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared dataset")
    parser.add_argument("--split", default="unseen_clip", help="unseen_clip or unseen_object")
    parser.add_argument("--clips", type=whole(1, 1 << 10), default=8, help="of the split")
    parser.add_argument(
        "--temperature", type=real(0, 1000), nargs="+", default=[1.0, 0.7, 0.5, 0.3], metavar="T"
    )
    parser.add_argument(
        "--top_k", type=_top_k, nargs="+", default=[None], metavar="K", help="numbers, or all"
    )
    parser.add_argument(
        "--cfg", type=real(-1000, 1000), nargs="+", default=[1.0], help="guidance scales"
    )
    parser.add_argument(
        "--history_cfg",
        type=real(-1000, 1000),
        nargs="+",
        default=[1.0],
        metavar="CFG",
        help="scales of guidance towards the timesteps before",
    )
    parser.add_argument(
        "--lpips", type=Path, metavar="FILE", help="LPIPS' weights: measure it and the flicker"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures as JSON")
    model_flag(parser)


def run(arguments: argparse.Namespace) -> None:
    import json

    from fourdstar_jax.evaluate import sampling
    from fourdstar_jax.folders import replace_file

    rows = sampling.sweep(
        arguments.model,
        arguments.data,
        arguments.split,
        clips=arguments.clips,
        temperatures=arguments.temperature,
        top_ks=arguments.top_k,
        cfgs=arguments.cfg,
        history_cfgs=arguments.history_cfg,
        lpips=arguments.lpips,
    )
    if arguments.json is not None:
        replace_file(arguments.json, f"{json.dumps(rows, indent=1)}\n".encode())
