"""`fourdstar prepare`: animated GLB files to a dataset."""

import argparse
from pathlib import Path

from fourdstar_jax.cli import encode_text, tokenize
from fourdstar_jax.cli.common import FPS, whole

SUMMARY = "render animated GLB files into a dataset, or encode a dataset: tokens, text features"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of GLB files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--image_size", type=whole(1, 1024), default=64, help="pixels a side")
    parser.add_argument("--views", type=whole(1, 64), default=4, help="rig views, equally around")
    parser.add_argument(
        "--extra_views", type=whole(0, 63), default=2, help="random views, for losses"
    )
    parser.add_argument(
        "--max_frames", type=whole(1, 1024), default=8, help="of a clip; the rest is cut"
    )
    parser.add_argument("--fps", type=FPS, default=8.0, help="sampling of the animations")
    parser.add_argument("--licence", help="only assets of this licence in assets.csv, such as CC0")
    parser.add_argument("--limit", type=whole(1, 10**9), help="only so many assets")
    parser.add_argument(
        "--flow", action=argparse.BooleanOptionalAction, default=True, help="optical flow"
    )
    parser.add_argument(
        "--depth", action=argparse.BooleanOptionalAction, default=False, help="depth maps"
    )
    parser.add_argument(
        "--workers", type=whole(0, 1024), help="processes; 0 works in this one, default one a core"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="encode the dataset --data with the tokenizer --bundle",
    )
    parser.add_argument(
        "--text_features",
        "--text-features",
        action="store_true",
        help="encode the captions of the dataset --data with the text encoder of --bundle",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset to encode")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="has the encoder")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16"],
        default="bfloat16",
        help="in which text features are kept",
    )
    parser.add_argument(
        "--batch", type=whole(1, 1 << 16), default=8, help="captions at once (--text_features)"
    )


def run(arguments: argparse.Namespace) -> None:
    if arguments.tokens and arguments.text_features:
        raise ValueError("give --tokens or --text_features, not both")
    if arguments.tokens or arguments.text_features:
        flag = "--tokens" if arguments.tokens else "--text_features"
        if arguments.data is None or arguments.bundle is None:
            raise ValueError(f"{flag} needs --data DIR and --bundle DIR")
        command = tokenize if arguments.tokens else encode_text
        return command.run(arguments)
    if arguments.assets is None:
        raise ValueError("--assets DIR is needed")
    if not arguments.assets.is_dir():
        raise ValueError(f"{arguments.assets} is not a folder")
    from fourdstar_jax.data import prepare

    prepare.prepare(
        arguments.assets,
        arguments.out,
        image_size=arguments.image_size,
        views=arguments.views,
        extra_views=arguments.extra_views,
        max_frames=arguments.max_frames,
        fps=arguments.fps,
        licence=arguments.licence,
        limit=arguments.limit,
        flow=arguments.flow,
        depth=arguments.depth,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )
