"""`fourdstar inspect`: what a bundle or a dataset holds."""

import argparse
from pathlib import Path
from typing import Any

from fourdstar_jax.arguments import counted, there
from fourdstar_jax.cli.common import BUNDLED_MODEL, bundle_folder, there_is_a_bundle, whole

SUMMARY = "tell what a model bundle or a dataset holds"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle", type=bundle_folder, nargs="?", default=BUNDLED_MODEL, help="folder of either kind"
    )
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE", help="write a picture of a dataset's objects"
    )
    parser.add_argument(
        "--clusters",
        type=Path,
        metavar="FILE",
        help="write a picture of the container's clusters of a clip of --data (Figure 7)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared dataset for --clusters")
    parser.add_argument("--split", default="unseen_clip", help="of --data")
    parser.add_argument("--clip", type=whole(0, 1 << 31), default=0, help="of the split")


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax import bars
    from fourdstar_jax.folders import DATASET, OBJECT, is_of_kind

    there(arguments.bundle)
    if is_of_kind(arguments.bundle, OBJECT):
        raise ValueError(f"{arguments.bundle} is an object: `fourdstar view` shows it")
    if is_of_kind(arguments.bundle, DATASET):
        return _dataset(arguments.bundle, arguments.sheet)
    there_is_a_bundle(arguments.bundle)
    with bars.waiting("loading"):
        from fourdstar_jax import bundle

    if arguments.clusters is not None:
        return _clusters(arguments)
    if arguments.sheet is not None:
        raise ValueError(f"{arguments.bundle} is not a dataset: --sheet needs one")
    found = bundle.read(arguments.bundle)
    print(f"bundle {arguments.bundle}")
    if found.tokenizer is not None:
        print(f"  tokens: {_short(found.tokenizer.to_dict())}")
    star = found.stages.get("star")
    takes_features = star is not None and star.model.get("text_encoder") == "t5"
    for name in (*bundle.STAGES, *bundle.RAW_STAGES):
        stage = found.stages.get(name)
        if stage is None:
            needed = name != "text" or takes_features
            if needed and name not in bundle.RAW_STAGES:
                print(f"  {name}: not there yet")
            continue
        print(f"  {name}: {stage.num_parameters or 0:,} numbers as {stage.storage}")
        print(f"    sha256 {stage.sha256}")
        for key, value in sorted(stage.info.items()):
            print(f"    {_printable(key)}: {_short(value)}")
    print(f"  written by {_short(found.packages)}")


def _clusters(arguments: argparse.Namespace) -> None:
    if arguments.data is None:
        raise ValueError("--clusters needs --data, a prepared dataset")
    from fourdstar_jax.evaluate import clusters

    found = clusters.write(
        arguments.bundle,
        arguments.data,
        arguments.clusters,
        split=arguments.split,
        clip=arguments.clip,
    )
    sizes = sorted(found.occupancy.tolist(), reverse=True)
    print(f"{arguments.clusters}: what the last timestep of clip {arguments.clip} is told")
    told = f"{sum(sizes)} of {len(found.assignment)} tokens"
    print(f"  {len(sizes)} clusters of {len(found.valid)}, {told}")
    print(f"  tokens of each, most first: {' '.join(map(str, sizes))}")


def _short(value: Any) -> str:
    """A value in one line, of long lists how long."""
    match value:
        case dict() if len(value) > 12:
            return f"({len(value)} fields)"
        case dict():
            return ", ".join(f"{_printable(k)} {_short(v)}" for k, v in value.items())
        case list() if len(value) > 8:
            return f"({len(value)} values)"
        case list():
            return f"[{', '.join(map(_short, value))}]"
    return _printable(value)


def _printable(value: Any) -> str:
    text = str(value)
    return (text if text.isprintable() else ascii(text))[:100]


def _dataset(folder: Path, picture: Path | None) -> None:
    from fourdstar_jax.data import pipeline, sheet

    manifest = pipeline.read_manifest(folder)
    print(f"dataset {folder}")
    for name, value in manifest["settings"].items():
        print(f"  {name}: {_short(value)}")
    for split, clips in manifest["splits"].items():
        told = manifest.get("counts", {}).get(split, {"clips": clips})  # older ones have none
        print(f"  {split}: " + ", ".join(f"{k} {v}" for k, v in told.items()))
    if picture is not None:
        print(f"  {counted(sheet.write(folder, picture), 'objects')} in {picture}")
