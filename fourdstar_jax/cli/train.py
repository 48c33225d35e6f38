"""`fourdstar train`: one stage by its config."""

import argparse
from pathlib import Path
from typing import Any

SUMMARY = "train one stage: tokenizer, vqvae or star"
DESCRIPTION = """
Train one stage. Any value of the config can be overridden: --config=configs/star.py:tiny
--config.schedule.learning_rate=1e-3. A config is Python code that is run: use your own.
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_overrides=True)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="configs/star.py:tiny"
    )
    parser.add_argument(
        "--workdir",
        required=True,
        metavar="DIR",
        help="checkpoints and metrics; a run that finds its checkpoints there continues",
    )


def run(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.config, arguments.overrides)
    import importlib

    if config.get("stage") not in ("tokenizer", "vqvae", "star"):
        raise ValueError(f"config.stage {config.get('stage')!r} is not tokenizer, vqvae or star")
    trainer = importlib.import_module(f"fourdstar_jax.train.{config.stage}")
    trainer.train(config, arguments.workdir)


def read_config(config: str, overrides: list[str]) -> Any:
    """The locked ConfigDict of `file.py[:argument]` with `--config.key=value` overrides.

    A file that is not below the current folder is looked for in the package's checkout. Raises
    ValueError, in one line, for what ml_collections refuses.
    """
    name, colon, argument = config.partition(":")
    if "://" in config:
        raise ValueError(f"--config {config}: configs are code and are not read from the network")
    path = Path(name)
    if not path.is_file() and not path.is_absolute():
        path = Path(__file__).resolve().parents[2] / name
    if not path.is_file():
        raise ValueError(f"config file {name} does not exist")
    wrong = [word for word in overrides if word.startswith("-") and "config." not in word]
    wrong = [word for word in wrong if not word[1:].replace(".", "").isdigit()]
    if wrong:
        raise ValueError(f"unrecognized arguments: {' '.join(wrong)}")

    from absl import flags
    from ml_collections import config_flags

    argv = ["fourdstar", f"--config={path}{colon}{argument}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        left = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().strip('"').splitlines()]
        # after a traceback, which ml_collections puts into its message, the error itself
        line = lines[-1] if lines and "whilst parsing" in lines[0] else " ".join(lines)
        raise ValueError(f"--config {config}: {line}") from error
    if left[1:]:
        raise ValueError(f"unrecognized arguments: {' '.join(left[1:])}")
    return values["config"].value
