#!/usr/bin/env python
"""`fourdstar generate --videos` on Ray Data: CPUs decode, a pool of actors generates.

    pip install 'fourdstar-jax[ray,cuda]'
    python launch/ray/generate.py --videos LIST --out OUT --actors 8 --gpus 1

Run it on a machine of the cluster (`ray job submit`), or alone: Ray starts itself there. LIST and
OUT are on a file system that all machines see. A row is a video. One whose output is in OUT, or
that is quarantined, is left out at the start and passed over by an actor that gets it again: a run
that was stopped goes on where it was, and an actor that dies costs no more than what it was at.
Flags that are not listed here are those of `fourdstar generate`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from fourdstar_jax import batch
from fourdstar_jax.cli import generate as command
from fourdstar_jax.cli.common import EXIT_BAD_INPUT, load_model, whole
from fourdstar_jax.generate import Clip


def read(row: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A row with what the model will see of its video, or why it cannot be used."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # this process loads no weights and needs no GPU
    try:
        clip = load_model(arguments.model).read(row["video"], **command.reading(arguments))
    except ValueError as error:
        clip = Clip(np.zeros((0, 1, 1, 3), np.float32), {})
        return row | {"images": clip.images, "info": "{}", "reason": one_line(error)}
    return row | {"images": clip.images, "info": json.dumps(clip.info), "reason": ""}


class Generator:
    """A loaded model, compiled once for every number of timesteps."""

    def __init__(self, arguments: argparse.Namespace):
        self._size, self._options = arguments.size, command.options(arguments)
        self._outputs, self._timed = batch.Outputs(arguments.out), arguments.timing
        self._model = load_model(arguments.model)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        item = batch.Item(Path(row["video"]), row["name"], row["text"] or None)
        clip, reason = Clip(row["images"], json.loads(row["info"])), row["reason"]
        if self._outputs.done(item):  # by an actor that died after it
            return {"name": item.name, "reason": self._outputs.reason(item) or ""}
        if not reason:
            try:
                self._outputs.write(
                    item, self._model, clip, size=self._size, timed=self._timed, **self._options
                )
            except (ValueError, FloatingPointError) as error:
                reason = one_line(error)
        if reason:
            self._outputs.quarantine(item, reason)
        return {"name": item.name, "reason": reason}


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make an object of each video of a list, on Ray Data.", allow_abbrev=False
    )
    parser.add_argument("--actors", type=whole(1, 10_000), default=1, help="that generate")
    parser.add_argument("--gpus", type=float, default=1.0, help="of an actor; 0 without GPUs")
    command.add_flags(parser)
    arguments = parser.parse_args()
    if arguments.videos is None or arguments.out is None or arguments.shard is not None:
        parser.error("give --videos and --out, and no --shard: Ray divides the list")
    arguments.out, arguments.model = arguments.out.resolve(), arguments.model.resolve()
    items = batch.read_list(arguments.videos.resolve())
    outputs = batch.Outputs(arguments.out)
    for item in items:
        if arguments.retry:
            outputs.forget(item)
    batch.check(load_model(arguments.model), command.reading(arguments), command.options(arguments))
    todo = [
        {"video": str(item.video), "name": item.name, "text": item.text or ""}
        for item in items
        if not outputs.done(item)
    ]
    print(f"{len(items) - len(todo)} of {len(items)} are done already")
    if not todo:
        return 0
    ray.init(log_to_driver=False, logging_level="WARNING")
    ray.data.DataContext.get_current().enable_progress_bars = False
    made = (
        ray.data.from_items(todo, override_num_blocks=len(todo))
        .map(read, fn_args=[arguments], num_cpus=1)
        .map(
            Generator,
            fn_constructor_args=[arguments],
            compute=ray.data.ActorPoolStrategy(size=arguments.actors),
            num_cpus=0.5,  # not what `read` takes: Ray would run both in one process
            num_gpus=arguments.gpus,
        )
    )
    count = 0
    for row in made.iter_rows():
        count += not row["reason"]
        if row["reason"]:
            print(f"quarantined: {row['name']}: {row['reason']}", file=sys.stderr)
    print(f"{count} made, {len(todo) - count} quarantined ({arguments.out / batch.QUARANTINED})")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"generate.py: {one_line(error)}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
