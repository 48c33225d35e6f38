"""`fourdstar inspect`: what a bundle holds."""

import argparse
from pathlib import Path
from typing import Any

from fourdstar_jax.cli.common import BUNDLED_MODEL

SUMMARY = "tell what a model bundle holds"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, nargs="?", default=BUNDLED_MODEL)


def run(arguments: argparse.Namespace) -> None:
    from fourdstar_jax import bundle

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
