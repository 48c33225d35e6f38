"""`fourdstar prepare`: animated GLB files to a dataset."""

import argparse
from pathlib import Path

from fourdstar_jax.arguments import FPS
from fourdstar_jax.cli import encode_text, tokenize
from fourdstar_jax.cli.common import bundle_folder, real, shard, whole
from fourdstar_jax.data.settings import MAX_POINTS, MAX_SAMPLES, SAMPLES, Limits, Settings
from fourdstar_jax.data.splits import SPLITS

SUMMARY = (
    "render animated GLB files into a dataset, or make of a dataset: tokens, text features, "
    "captions of its motions"
)

LIMITS = Limits()


def add_flags(parser: argparse.ArgumentParser) -> None:
    default = Settings()
    parser.add_argument("--assets", type=Path, metavar="DIR", help="folder of GLB files")
    parser.add_argument(
        "--renders",
        type=Path,
        metavar="DIR",
        help="in place of --assets: pictures as L4GM's Blender script writes (docs/DATASET.md)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output; with --describe a CSV file"
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="only these: a path below --assets a line"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        nargs="+",
        default=[],
        metavar="CSV",
        help="rows `uid,caption` as Cap3D's for looks, `clip_id,caption` for motions",
    )
    parser.add_argument(
        "--work",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="keeps rendered assets, which a second run does not render again; all shards share "
        "it, or have one each: what is in further folders counts as well",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="render the I-th of N parts into --work, then what others left; no dataset is made",
    )
    parser.add_argument(
        "--timeout",
        type=real(1, 1e6),
        default=LIMITS.seconds,
        metavar="SECONDS",
        help="an asset that takes longer is quarantined",
    )
    parser.add_argument(
        "--memory",
        type=real(0.1, 4096),
        default=LIMITS.memory / 2**30,
        metavar="GIB",
        help="an asset that needs more is quarantined",
    )
    parser.add_argument(
        "--retry", action="store_true", help="try assets again that --work has quarantined"
    )
    parser.add_argument("--licence", help="only assets of this licence in assets.csv, such as CC0")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        help="only clips of these, as of a benchmark (docs/EVALUATION.md); default all",
    )
    parser.add_argument("--limit", type=whole(1, 10**9), help="only so many assets")
    for name, kind, text in (
        ("image_size", whole(1, 1024), "pixels a side"),
        ("views", whole(1, 64), "rig views, equally around"),
        ("extra_views", whole(0, 63), "random views, for losses"),
        ("max_frames", whole(1, 1024), "of a clip; the rest is cut"),
        ("fps", real(*FPS), "sampling of the animations"),
        ("points", whole(0, MAX_POINTS), "tracked points of the surface, for evaluation"),
        ("rigs", whole(1, 64), "times a clip of training is seen, from another side each"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name), help=text)
    parser.add_argument(
        "--zoom",
        type=real(0.1, 2),
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="of clips of training, drawn at random between the two; default "
        + " ".join(map(str, default.zoom)),
    )
    parser.add_argument(
        "--shift",
        type=real(0, 0.2),
        metavar="SHARE",
        help="of clips of training: drawn at random, at most so far off the middle, of a picture's "
        f"side; default {default.shift}",
    )
    for name, text in (("flow", "optical flow"), ("depth", "depth maps")):
        parser.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"{text}; default {'on' if getattr(default, name) else 'off'}, off with --renders",
        )
    parser.add_argument(
        "--blender",
        metavar="PROGRAM",
        help="a Blender, or a Python that has bpy: its Cycles draws the colours (docs/DATASET.md)",
    )
    parser.add_argument(
        "--samples",
        type=whole(1, MAX_SAMPLES),
        help=f"of a pixel, with --blender; default {SAMPLES}",
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
    parser.add_argument(
        "--describe",
        metavar="MODEL",
        help="write captions of the motions of the dataset --data, which --captions reads; by a "
        "Qwen2.5-VL: a folder, or a name on the hub, as transformers loads it (docs/DATASET.md)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset to encode or describe")
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
    parser.add_argument(
        "--frames",
        type=whole(1, 1024),
        default=8,
        help="of a clip that the model sees, at most (--describe)",
    )


def run(arguments: argparse.Namespace) -> None:
    if sum(map(bool, (arguments.tokens, arguments.text_features, arguments.describe))) > 1:
        raise ValueError("give one of --tokens, --text_features and --describe")
    if arguments.describe:
        return _describe(arguments)
    if arguments.tokens or arguments.text_features:
        flag = "--tokens" if arguments.tokens else "--text_features"
        if arguments.data is None or arguments.bundle is None:
            raise ValueError(f"{flag} needs --data DIR and --bundle DIR")
        _out(arguments)
        command = tokenize if arguments.tokens else encode_text
        return command.run(arguments)
    assets = arguments.renders or arguments.assets
    if assets is None:
        raise ValueError("--assets DIR is needed")
    if arguments.renders and arguments.assets:
        raise ValueError("give --assets or --renders, not both")
    if not assets.is_dir():
        raise ValueError(f"{assets} is not a folder")
    if arguments.shard is not None and (not arguments.work or arguments.out is not None):
        raise ValueError(
            "--shard needs --work DIR and no --out: when all shards are "
            "done, the same command with --out instead of --shard makes the dataset"
        )
    if arguments.retry and not arguments.work:
        raise ValueError("--retry needs --work DIR")
    from fourdstar_jax.data import prepare

    limits = Limits(arguments.timeout, int(arguments.memory * 2**30))
    options = {name: getattr(arguments, name) for name in ("licence", "limit", "workers", "retry")}
    usual = Settings()
    if arguments.renders:  # what pictures do not have
        usual = usual._replace(flow=False, depth=False, zoom=(1.0, 1.0), shift=0.0)
    for name in Settings._fields:
        given = getattr(arguments, name)
        options[name] = getattr(usual, name) if given is None else given
    options["renders"] = arguments.renders is not None
    options["splits"] = arguments.splits and tuple(dict.fromkeys(arguments.splits))
    options |= {"list_file": arguments.list, "limits": limits, "more_work": arguments.work[1:]}
    if arguments.shard is not None:
        prepare.render(assets, arguments.work[0], shard=arguments.shard, **options)
        return
    prepare.prepare(
        assets,
        _out(arguments),
        captions_from=arguments.captions,
        work_dir=arguments.work[0] if arguments.work else None,
        overwrite=arguments.overwrite,
        **options,
    )


def _describe(arguments: argparse.Namespace) -> None:
    if arguments.data is None or arguments.out is None:
        raise ValueError("--describe needs --data DIR and --out CSV")
    from fourdstar_jax.data import describe, qwen

    describe.describe(
        arguments.data,
        arguments.out,
        lambda: qwen.Qwen(arguments.describe),
        frames=arguments.frames,
        overwrite=arguments.overwrite,
    )


def _out(arguments: argparse.Namespace) -> Path:
    if arguments.out is None:
        raise ValueError("--out DIR is needed")
    return arguments.out
