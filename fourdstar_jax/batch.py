"""Many videos to objects, by one process or by many that share the output folder.

    OUT/<name>/                    an object, as `export.save` writes it; there whole or not at all
    OUT/quarantined/<name>.json    why there is none of a video
    OUT/.claims/                   which process is at which video (`shards.Claims`)

What is there is not made again, whatever it was made with.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fourdstar_jax import export, remote, timing
from fourdstar_jax.arguments import counted
from fourdstar_jax.folders import OBJECT, is_of_kind, output_folder, replace_file
from fourdstar_jax.generate import SCALES, Clip, Model
from fourdstar_jax.lists import QUARANTINED, Item
from fourdstar_jax.shards import WHOLE, Claims, Shard

CLAIM_S = 3600.0  # after which a video of a machine that is not heard of is anybody's


class Outputs:
    """The folder of all outputs, which other processes may write to as well."""

    def __init__(self, folder: Path):
        self.folder = folder
        if remote.url_of(folder) is not None:
            raise ValueError(
                f"{folder}: the outputs of a list go to a folder, not to an object store"
            )
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output folder {folder} is a file")
        self._claims = Claims(folder / ".claims", CLAIM_S)

    def made(self, item: Item) -> bool:
        """Whether the object is there."""
        return is_of_kind(self.folder / item.name, OBJECT)

    def reason(self, item: Item) -> str | None:
        """Why a video is quarantined; None if it is not."""
        try:
            return str(json.loads(self._told(item).read_text())["reason"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def done(self, item: Item) -> bool:
        """Whether there is nothing to do."""
        return self.made(item) or self.reason(item) is not None

    def forget(self, item: Item) -> None:
        """A video is no more quarantined."""
        self._told(item).unlink(missing_ok=True)

    @contextlib.contextmanager
    def taken(self, item: Item) -> Iterator[bool]:
        """Whether the video is to be done, and by this process, which has it within the block."""
        if self.done(item) or not self._claims.take(item.name):
            yield False
            return
        try:
            yield not self.done(item)
        finally:
            self._claims.release(item.name)

    def quarantine(self, item: Item, reason: str) -> None:
        """Says why there is nothing of a video."""
        said = json.dumps({"video": str(item.video), "reason": reason}, indent=1)
        replace_file(self._told(item), (said + "\n").encode())

    def write(
        self,
        item: Item,
        model: Model,
        clip: Clip,
        *,
        size: int,
        timed: bool = False,
        **options: Any,
    ) -> None:
        """Makes the object of a clip; `options` are those of `Model.generate`."""
        with output_folder(self.folder / item.name, OBJECT) as folder:
            options = options | ({"text": item.text} if item.text is not None else {})
            start = time.perf_counter()
            object4d = model.generate(clip, **options)
            if timed:
                object4d.meta["generation"] = timing.of_generation(start)
            export.write(object4d, folder, size=size)

    def _told(self, item: Item) -> Path:
        return self.folder / QUARANTINED / f"{item.name}.json"


def check(model: Model, reading: dict[str, Any], options: dict[str, Any]) -> None:
    """Raises ValueError for what would be wrong with every video, before the first is read."""
    probe = np.full((1, 16, 16, 3), 255, np.uint8)
    used = {k: v for k, v in reading.items() if k not in ("fit", "start", "masks", "rembg")}
    model.read(probe, fit="none", **used)
    model.settings(**{k: options.get(k) for k in ("temperature", "top_k", *SCALES.values())})
    model.encode_text(options.get("text") or "an object")


def generate(
    load: Callable[[], Model],
    items: list[Item],
    out: Path,
    *,
    shard: Shard = WHOLE,
    reading: dict[str, Any],
    options: dict[str, Any],
    size: int = 256,
    timed: bool = False,
    retry: bool = False,
    log: Callable[[str], None] = print,
    warn: Callable[[str], None] = print,
) -> None:
    """Makes what is missing: of the shard's videos, then of those that other shards have not begun.

    The model is loaded once, if there is anything to do, and compiled once for every number of
    timesteps. `reading` is for `Model.read`, `options` for `Model.generate`; `timed` adds how long
    that took to the manifests. A video that cannot be
    used is quarantined and told by `warn`. Raises ValueError for what is wrong with all.
    """
    outputs, model, counts = Outputs(out), None, {"made": 0, "quarantined": 0, "there": 0}
    own = set(shard.own(len(items)))
    for i in (*shard.own(len(items)), *shard.others(len(items))):
        item = items[i]
        if retry and i in own:
            outputs.forget(item)
        with outputs.taken(item) as mine:
            if not mine:
                counts["there"] += i in own
                continue
            if model is None:
                model = load()
                check(model, reading, options)
                log("the first video takes longer: programs are compiled")
            try:
                clip = model.read(item.video, **reading)
                outputs.write(item, model, clip, size=size, timed=timed, **options)
            except (ValueError, FloatingPointError) as error:
                reason = " ".join(str(error).split())
                outputs.quarantine(item, reason)
                counts["quarantined"] += 1
                warn(f"quarantined: {item.video}: {reason}")
            else:
                counts["made"] += 1
                log(f"{counted(len(clip.images), 'timesteps')} of 3D Gaussians: {out / item.name}")
    left = sum(not outputs.done(item) for item in items)
    log(
        f"{counts['made']} made, {counts['quarantined']} quarantined ({out / QUARANTINED}), "
        f"{counts['there']} were done or begun"
        + (f"; {left} are other processes' to do" if left else "")
    )
