"""`fourdstar prepare`: animated GLB files to a dataset."""

import argparse
from pathlib import Path

from fourdstar_jax.cli import encode_text, tokenize
from fourdstar_jax.cli.common import FPS, bundle_folder, real, whole
from fourdstar_jax.data.settings import MAX_POINTS, Settings

SUMMARY = "render animated GLB files into a dataset, or encode a dataset: tokens, text features"


def add_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of GLB files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--licence", help="only assets of this licence in assets.csv, such as CC0")
    parser.add_argument("--limit", type=whole(1, 10**9), help="only so many assets")
    for name, kind, text in (
        ("image_size", whole(1, 1024), "pixels a side"),
        ("views", whole(1, 64), "rig views, equally around"),
        ("extra_views", whole(0, 63), "random views, for losses"),
        ("max_frames", whole(1, 1024), "of a clip; the rest is cut"),
        ("fps", FPS, "sampling of the animations"),
        ("points", whole(0, MAX_POINTS), "tracked points of the surface, for evaluation"),
        ("rigs", whole(1, 64), "times a clip of training is seen, from another side each"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name), help=text)
    parser.add_argument(
        "--zoom",
        type=real(0.1, 2),
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=default.zoom,
        help="of clips of training, drawn at random between the two",
    )
    for name, text in (("flow", "optical flow"), ("depth", "depth maps")):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            default=getattr(default, name),
            help=text,
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
    parser.add_argument("--bundle", type=bundle_folder, metavar="DIR", help="has the encoder")
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
        licence=arguments.licence,
        limit=arguments.limit,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        **{name: getattr(arguments, name) for name in Settings._fields},
    )
