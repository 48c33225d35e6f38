"""A whole split's pictures as arrays, for a dataset that lies on the device.

The loader then sends numbers of frames, and the step gathers them (`train.inputs`): nothing is
decoded or copied in training.
"""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float16, UInt8

from fourdstar_jax.data import pipeline
from fourdstar_jax.data.quarantine import Readable
from fourdstar_jax.types import Array

SHARE = 0.6  # of a device's memory that the pictures may take
THREADS = os.cpu_count() or 1  # that decode
PIXELS = {  # of a record, and of `Frames`
    "rig_rgba": "rgba",
    "extra_rgba": "extra_rgba",
    "rig_flow": "flow",
    "rig_depth": "depth",
}


class Frames(NamedTuple):
    """All frames of all clips, one after another (a pytree); as records have them."""

    rgba: UInt8[Array, "F V h w 4"]
    extra_rgba: UInt8[Array, "F E h w 4"] | None
    flow: Float16[Array, "F V h w 2"] | None
    depth: Float16[Array, "F V h w 1"] | None


class Clips:
    """A split's clips without their pixels, but with the number of their first frame.

    A grain random-access source.
    """

    def __init__(self, clips: Sequence[Mapping[str, Any]], name: str):
        self._clips, self._name = clips, name

    def __len__(self) -> int:
        return len(self._clips)

    def __repr__(self) -> str:  # grain stores it beside the iterator's state
        return self._name

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._clips[int(i)]


def read(
    data_dir: str | Path, split: str, *, maps: Sequence[str] = pipeline.MAPS, extra: bool = True
) -> tuple[Frames, Clips]:
    """The pictures of a split, in the host's memory, with `maps` of those that it has.

    Those of extra views only with `extra`.

    Raises ValueError as `pipeline.ClipSource` does, and for pictures that take more than SHARE of a
    device's memory.
    """
    source = pipeline.ClipSource(data_dir, split, cache_bytes=0, maps=maps)
    readable = Readable(source)
    clips, parts, first = [], [], 0
    limit = memory()
    with ThreadPoolExecutor(THREADS) as pool:
        size = 0
        for clip in pool.map(readable.__getitem__, range(len(readable))):
            wanted = [key for key in PIXELS if key in clip and (extra or key != "extra_rgba")]
            pixels = {PIXELS[key]: clip[key] for key in wanted}
            parts.append(pixels)
            rest = {key: value for key, value in clip.items() if key not in PIXELS}
            clips.append(rest | {"first": first})
            first += len(pixels["rgba"])
            size += sum(x.nbytes for x in pixels.values())
            if limit is not None and size > SHARE * limit:
                pool.shutdown(cancel_futures=True)
                share = len(clips) / len(source)
                raise ValueError(
                    f"{data_dir}, split {split}: {share:.0%} of its pictures take "
                    f"{size / 2**30:.1f} GiB, and they may take {SHARE:.0%} of a device's "
                    f"{limit / 2**30:.1f} GiB: set config.data.on_device=False"
                )

    def joined(name):
        return np.concatenate([part.pop(name) for part in parts])

    arrays = {name: joined(name) for name in list(parts[0])}
    if "depth" in arrays:
        arrays["depth"] = arrays["depth"][..., None]
    frames = Frames(**dict.fromkeys(Frames._fields) | arrays)  # pyright: ignore[reportArgumentType]
    return frames, Clips(clips, repr(source))


def memory() -> int | None:
    """Bytes of a device's memory; None where it does not tell."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None
