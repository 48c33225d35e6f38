"""`fourdstar train`: one stage by its config."""

import argparse
import difflib
import re
from pathlib import Path
from typing import Any

from fourdstar_jax.cli.common import real, whole
from fourdstar_jax.outside import MAX_SEED

SUMMARY = "train one stage: tokenizer, vqvae or star"
DESCRIPTION = """
Train one stage. Any value of the config can be overridden: --config=configs/star.py:tiny
--config.schedule.learning_rate=1e-3. A config is Python code that is run: use your own.

The same command on every machine of a TPU pod, and under Slurm's srun, mpirun or Kubernetes, is one
run; elsewhere JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID make it one.
SIGTERM or SIGINT saves after the step that runs and ends; a second one ends at once.

--dry-run trains nothing and prints what a step needs on this machine's devices, on --devices N
simulated ones, or on a --topology of TPUs; --plan finds out how a step fits into --memory, and
prints the command.
"""
# Numbers of a config by the end of their name; those of `model` are checked by its constructor.
COUNT = (1, 1e9)
RANGES = {
    "seed": (0, MAX_SEED),
    "steps": COUNT,
    "batch_size": (1, 1e6),
    "timesteps": (1, 1 << 16),
    "num_timesteps": (1, 1 << 16),
    "rig_views": (0, 64),
    "extra_views": (0, 64),
    "num_groups": (1, 1 << 16),
    "capacity": (1, 2**31 - 1),
    "top_k": (1, 1 << 20),
    "temperature": (0, 1000),
    "cfg_scale": (-1000, 1000),
    "history_scale": (-1000, 1000),
    "clips": (0, 1 << 10),
    "every": COUNT,
    "log_every": COUNT,
    "eval_every": COUNT,
    "picture_every": COUNT,
    "checkpoint_every": COUNT,
    "repair_every": COUNT,
    "repair_until": (0, 1),
    "learning_rate": (0, 1e3),
    "warmup_steps": (0, 1e9),
    "b1": (0, 1),
    "b2": (0, 1),
    "weight_decay": (0, 1e3),
    "clip_norm": (0, 1e9),
    "average": (0, 1),
    "drop_text": (0, 1),
    "drop_video": (0, 1),
    "history_noise": (0, 1),
    "code_noise": (0, 1),
    "mirror": (0, 1),
    "colour": (0, 1),
    "hue": (0, 0.5),
    "saturation": (0, 10),
    "value": (0, 10),
    "weight": (0, 1e6),
    "start": (0, 1),
    "multiplier": (1e-3, 16),
    "r1_every": COUNT,
    "r1_weight": (0, 1e6),
    "near": (1, 1 << 20),
    "watchdog": (0, 1e6),
    "nonfinite_steps": (0, 1e9),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(takes_overrides=True)
    parser.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="configs/star.py:tiny"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        help="checkpoints and metrics, a folder, gs:// or s3://; a run that finds its checkpoints "
        "there continues",
    )
    parser.add_argument(
        "--profile", metavar="FIRST:LAST", help="a trace of these steps in WORKDIR/profile"
    )
    look = parser.add_argument_group("before a run (star and vqvae)")
    look.add_argument("--dry-run", action="store_true", help="tell parameters, memory, FLOPs")
    look.add_argument("--plan", action="store_true", help="find what fits into --memory")
    look.add_argument("--memory", type=real(0.001, 1e6), metavar="GB", help="of a device")
    where = look.add_mutually_exclusive_group()
    where.add_argument(
        "--devices", type=whole(1, 4096), metavar="N", help="so many simulated ones (CPUs)"
    )
    where.add_argument("--topology", metavar="NAME", help="TPUs such as v5p:4x4x4; needs libtpu")
    look.add_argument(
        "--views", type=whole(2, 64), metavar="N", help="of the rig, without a dataset"
    )


def run(arguments: argparse.Namespace) -> None:
    overrides = arguments.overrides
    if arguments.profile is not None:
        overrides = [*overrides, f"--config.profile={arguments.profile}"]
    config = read_config(arguments.config, overrides)
    if arguments.dry_run or arguments.plan:
        look(config, arguments)
        return
    if arguments.workdir is None:
        raise ValueError("--workdir DIR is missing: where checkpoints and metrics go")
    if Path(arguments.workdir).exists() and not Path(arguments.workdir).is_dir():
        raise ValueError(f"--workdir {arguments.workdir} is a file")
    import importlib

    if config.get("stage") not in ("tokenizer", "vqvae", "star"):
        raise ValueError(f"config.stage {config.get('stage')!r} is not tokenizer, vqvae or star")
    from fourdstar_jax import processes, signals

    place = processes.find()
    with processes.joined(place):
        if place is not None:
            print(_described(place), flush=True)
        trainer = importlib.import_module(f"fourdstar_jax.train.{config.stage}")
        with signals.answered():
            trainer.train(config, arguments.workdir)


def look(config: Any, arguments: argparse.Namespace) -> None:
    """`--dry-run` and `--plan`."""
    import os
    import shlex

    if arguments.plan and arguments.memory is None:
        raise ValueError("--plan needs --memory GB, of a device")
    if arguments.devices is not None:  # before JAX is imported
        flags = f"--xla_force_host_platform_device_count={arguments.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        os.environ["JAX_PLATFORMS"] = "cpu"
    from fourdstar_jax.train import dry_run

    devices = dry_run.topology(arguments.topology) if arguments.topology else None
    if arguments.dry_run:
        for line in dry_run.told(dry_run.look(config, devices, views=arguments.views)):
            print(line, flush=True)
    if not arguments.plan:
        return
    found = dry_run.plan(config, arguments.memory, devices, views=arguments.views)
    if found is None:
        raise ValueError(
            f"--plan: no step of {arguments.config} fits into {arguments.memory:g} GB on this "
            "mesh: spread the weights over more devices (--config.mesh.fsdp) or make the batch "
            "smaller"
        )
    overrides = [word for word in arguments.overrides if not _is_of(word, found)]
    overrides += [f"--config.{name}={value}" for name, value in found.items()]
    workdir = arguments.workdir or "WORKDIR"
    words = [f"--config={arguments.config}", f"--workdir={workdir}", *overrides]
    print("fourdstar train " + " ".join(shlex.quote(word) for word in words))


def _is_of(word: str, names: Any) -> bool:
    return word.lstrip("-").partition("=")[0].removeprefix("config.") in names


def _described(place: Any) -> str:
    """A process among others, in a line."""
    import socket

    import jax

    local, devices = jax.local_devices(), jax.devices()
    return (
        f"process {place.index} of {place.count} on {socket.gethostname()}: {len(local)} of "
        f"{len(devices)} devices ({local[0].device_kind}), coordinator {place.coordinator}"
    )


def read_config(config: str, overrides: list[str]) -> Any:
    """The locked ConfigDict of `file.py[:argument]` with `--config.key=value` overrides.

    A file that is not below the current folder is looked for in the package's checkout and in the
    installed package. Raises ValueError, in one line, for what ml_collections refuses.
    """
    name, colon, argument = config.partition(":")
    if "://" in config:
        raise ValueError(f"--config {config}: configs are code and are not read from the network")
    package = Path(__file__).resolve().parents[1]  # a wheel has configs/ inside, a checkout beside
    path = next(
        (p for p in (Path(name), package.parent / name, package / name) if p.is_file()), None
    )
    if path is None:
        raise ValueError(f"config file {name} does not exist")
    wrong = [word for word in overrides if word.startswith("-") and "config." not in word]
    wrong = [word for word in wrong if not word[1:].replace(".", "").isdigit()]
    if wrong:
        raise ValueError(f"unrecognized arguments: {' '.join(wrong)}")

    overridden = [word.lstrip("-").partition("=")[0] for word in overrides if "config." in word]
    found = _read(path, argument, [], config)
    for name in overridden:
        _check_name(found, name.removeprefix("config."), config)
    found = _read(path, argument, overrides, config)
    for name, value in _leaves(found).items():
        _check_number(name, value, config)
    return found


def _read(path: Path, argument: str, overrides: list[str], config: str) -> Any:
    """The ConfigDict of a file; ValueError, in one line, for what ml_collections refuses."""
    from absl import flags
    from ml_collections import config_flags

    argv = ["fourdstar", f"--config={path}:{argument}" if argument else f"--config={path}"]
    argv += overrides
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    try:
        left = values(argv)
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).strip().strip('"').splitlines()]
        # after a traceback, which ml_collections puts into its message, the error itself
        line = lines[-1] if lines and "whilst parsing" in lines[0] else " ".join(lines)
        raise ValueError(f"--config {config}: {line}") from error
    if left[1:]:
        raise ValueError(f"unrecognized arguments: {' '.join(left[1:])}")
    return values["config"].value


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Values by their whole name, such as `optim.weight_decay`."""
    from ml_collections import ConfigDict

    found = {}
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_name(found: Any, name: str, config: str) -> None:
    """ValueError for a name that the config has no value of, with those that may be meant."""
    name = re.sub(r"\[\d+\]", "", name)  # an entry of a list
    leaves = _leaves(found)
    if name in leaves:
        return
    place, _, last = name.rpartition(".")
    groups = {leaf.rpartition(".")[0] for leaf in leaves}
    if name in groups:
        place, problem = name, f"config.{name} is a group"
    else:
        problem = f"{config} has no {name}"
    while place not in groups:
        place = place.rpartition(".")[0]
    here = sorted(leaf for leaf in leaves if leaf.rpartition(".")[0] == place)
    ends = {leaf: leaf.rpartition(".")[2] for leaf in leaves}
    close = difflib.get_close_matches(last, set(ends.values()), n=3)  # the closest first
    close += [end for end in ends.values() if "".join(x[0] for x in end.split("_")) == last]
    meant = [leaf for end in close for leaf, its_end in ends.items() if its_end == end]
    if place == "":
        here += sorted(f"{group}.*" for group in groups if group and "." not in group)
    owner = f"config.{place}" if place else "config"
    hint = f"; did you mean {' or '.join(meant[:4])}?" if meant and name not in groups else ""
    raise ValueError(f"--config.{name}: {problem}{hint} ({owner} has {', '.join(here)})")


def _check_number(name: str, value: Any, config: str) -> None:
    """ValueError for a number that no training can use."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        low, high = RANGES.get(name.rpartition(".")[2], (-1e15, 1e15))
        if not low <= number <= high:
            raise ValueError(
                f"--config {config}: config.{name} must be from {low:.10g} to {high:.10g}, "
                f"not {number}"
            )
