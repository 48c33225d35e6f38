"""`fourdstar inspect`: what a bundle holds."""

import argparse
from pathlib import Path

from fourdstar_jax.cli.common import BUNDLED_MODEL

SUMMARY = "tell what a model bundle holds"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLED_MODEL)


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax import bundle

    found = bundle.read(arguments.bundle)
    print(f"bundle {arguments.bundle}")
    if found.tokenizer is not None:
        print("  tokens: " + ", ".join(f"{k} {v}" for k, v in found.tokenizer.to_dict().items()))
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
            print(f"    {key}: {str(value)[:200]}")
    print("  written by " + ", ".join(f"{k} {v}" for k, v in found.packages.items()))
