"""Checkpoints: training state, step and data iterator together, through Orbax (only here)."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import (
    jax_array_handlers,
    replica_slices,
    tensorstore_utils,
)

from fourdstar_jax import folders, outside, remote, signals
from fourdstar_jax.train.state import TrainState
from fourdstar_jax.train.workdir import Workdir

HASHES = "sha256.json"  # in the folder of a step: the SHA-256 of every other file in it
COMPLETE = "commit_success.txt"  # Orbax' mark of a step in an object store, written last
PINNED = "pinned_host"  # the memory that Orbax copies what a GPU holds to
AnyPath = Path | epath.Path


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path: checkpoints do not depend on the classes of the containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _pieces(state: Any) -> list[tuple[Any, tuple[int, ...], Any]]:
    """Device, shape and type of each piece of a state that Orbax will have this process save."""
    parallel = jax_array_handlers._get_default_use_replica_parallel()
    found = []
    for leaf in jax.tree.leaves(state):
        pieces = replica_slices.get_replica_slices(leaf, 0, parallel)
        for piece in pieces.replica_slices:
            device = jnp.asarray(piece.unsliced_data).device
            found.append((device, pieces.local_shape, leaf.dtype))
    return found


def _make_pinned(pieces: list[tuple[Any, tuple[int, ...], Any]]) -> None:
    """Takes pinned memory for all `pieces` at once, and leaves it to JAX, which keeps it."""
    taken = []
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # too little: the save will tell
        for device, shape, dtype in pieces:
            if any(memory.kind == PINNED for memory in device.addressable_memories()):
                place = jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED)
                taken.append(jax.device_put(np.zeros(shape, dtype), place))
        jax.block_until_ready(taken)


class Checkpoints:
    """Saves every `every` steps into `<workdir>/checkpoints`, keeps `keep`, restores the newest.

    A save is visible only when it is complete (Orbax writes aside and renames; in an object store
    it marks what is complete). One that fails, as
    on a full disk, raises ValueError at the next save or at the end; those before it stay. Which
    there are is asked of the disk: Orbax forgets some after a failure.

    Every file's hash is written beside them. A step whose files have changed since is named and set
    aside as `damaged-<step>` when the folder is opened: the newest sound one is the latest.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, every: int, keep: int = 2):
        self._workdir = workdir if isinstance(workdir, Workdir) else Workdir(workdir)
        self._path = self._workdir.checkpoints
        self._hashing: threading.Thread | None = None  # the files of the last step that was saved
        self._failed = threading.Event()
        self._reserving: threading.Thread | None = None
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=keep, cleanup_tmp_directories=True
        )
        if self._workdir.url is not None:
            options.atomicity_options = ocp.options.AtomicityOptions(
                mode=ocp.options.AtomicityMode.COMMIT_FILE
            )
            let_orbax_write_s3()
        logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
        with self._explained("cannot be opened"):
            if jax.process_index() == 0:
                set_damaged_aside(self._path)
            multihost_utils.sync_global_devices("checkpoints looked through")
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint on the disk."""
        return max(steps_in(self._path), default=None)

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, force: bool = False
    ) -> None:
        """Saves after `step` steps when that is due, or when forced; files are written later on."""
        if step == self.latest_step():
            return
        with self._explained("cannot be written"):
            if not force and not self._manager.should_save(step):
                self._manager.check_for_errors()
                return
            self._finish()  # the save before, or what `reserve` began
            self._workdir.send()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flatten(state)),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
                force=force,
            )
        if jax.process_index() == 0:
            self._failed = threading.Event()
            self._hashing = threading.Thread(
                target=self._write_hashes, args=(step, self._failed), daemon=True
            )
            self._hashing.start()

    def save_and_stop(
        self, number: int, step: int, state: TrainState, iterator: grain.DatasetIterator
    ) -> NoReturn:
        """Saves what there is, waits for it, and raises the signal `number` that asked for it."""
        self.save(step, state, iterator, force=True)
        self.close()
        multihost_utils.sync_global_devices("saved")
        print(f"saved step {step} in {self._path}", file=sys.stderr, flush=True)
        raise signals.Stopped(number)

    def restore(
        self, state: TrainState, iterator: grain.DatasetIterator
    ) -> tuple[TrainState, grain.DatasetIterator]:
        """The newest checkpoint laid out as `state` is; `state` itself where there is none.

        It may be of another mesh and of another number of processes.
        """
        step = self.latest_step()
        if step is None:
            return state, iterator
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flatten(state))
        with self._explained(f"of step {step} do not fit this config and its data"):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
            # of every process the same: as many batches (`data.pipeline.Share`)
            positions = sorted((self._path / str(step) / "data").glob("process_*.json"))
            iterator.set_state(outside.parse(positions[0].read_bytes(), str(positions[0])))
        leaves = [restored["state"][name] for name in _flatten(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), iterator

    def reserve(self, state: TrainState) -> None:
        """Has the host make the buffers of a save, while the first step is compiled.

        A GPU's state is saved through pinned memory. Once made it is kept for the next save, but
        to make 14 GB takes ten seconds, which the first save would hold the training up for.
        """
        if jax.default_backend() == "gpu":
            self._reserving = threading.Thread(
                target=_make_pinned, args=(_pieces(state),), daemon=True
            )
            self._reserving.start()

    def close(self) -> None:
        """Waits until the last save is complete; raises what went wrong in it."""
        with self._explained("cannot be written"):
            self._finish()
            self._manager.close()

    def _finish(self) -> None:
        """Waits for the last save and its hashes; raises what went wrong in it."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        try:
            self._manager.wait_until_finished()
        except Exception:
            self._failed.set()
            raise
        finally:
            if self._hashing is not None:
                self._hashing.join()
                self._hashing = None

    def _write_hashes(self, step: int, failed: threading.Event) -> None:
        """As soon as the step has its name, if the save does not fail."""
        try:
            while step not in steps_in(self._path):
                if failed.wait(0.05 if self._workdir.url is None else 1.0):
                    return
        except RuntimeError:  # the program ends, and Orbax lists in threads
            return
        file = self._path / str(step) / HASHES
        data = json.dumps(_hashes(file.parent), indent=0).encode()
        if isinstance(file, Path):
            folders.replace_file(file, data)
        else:  # there whole or not at all
            file.write_bytes(data)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Whatever Orbax and what it stands on raise as one line."""
        try:
            yield
        except Exception as error:
            line = " ".join(str(error).split())
            line = line if len(line) < 400 else f"{line[:200]} ... {line[-180:]}"
            raise ValueError(f"checkpoints in {self._path} {what}: {line}") from error


def steps_in(path: AnyPath) -> list[int]:
    """The complete steps in a folder of checkpoints."""
    steps = ocp.utils.checkpoint_steps(path)
    if isinstance(path, Path):
        return steps
    return [step for step in steps if (path / str(step) / COMPLETE).exists()]


def let_orbax_write_s3() -> None:
    """Makes Orbax 0.12.8 know `s3://`, as it knows `gs://`: it writes both through TensorStore.

    The endpoint is that of `AWS_ENDPOINT_URL`, if given.
    """
    normal, gcs = tensorstore_utils._normalize_path, gcs_utils.get_kvstore_for_gcs
    if hasattr(normal, "knows_s3"):
        return

    def normalized(path: str) -> str:
        return remote.url_of(path) or normal(path)

    def store(path: str) -> dict[str, Any]:
        if not path.startswith("s3://"):
            return gcs(path)
        bucket, _, key = path.removeprefix("s3://").partition("/")
        found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": key}
        if endpoint := os.environ.get("AWS_ENDPOINT_URL"):
            region = os.environ.get("AWS_DEFAULT_REGION", "us-east-1")
            found |= {"endpoint": endpoint, "aws_region": region}
        if "AWS_ACCESS_KEY_ID" in os.environ:  # else it looks for files first, and complains
            found["aws_credentials"] = {"type": "environment"}
        return found

    normalized.knows_s3 = True  # pyright: ignore[reportFunctionMemberAccess]
    tensorstore_utils._normalize_path = normalized
    tensorstore_utils._use_gcs_driver = lambda path: path.startswith(("gs://", "s3://"))
    gcs_utils.get_kvstore_for_gcs = store


def set_damaged_aside(path: AnyPath) -> None:
    """Renames the newest steps below `path` until one is as it was written, and says why.

    A step without hashes, of a run that was killed while it took them, counts as sound: it has its
    name because Orbax had written all of it.
    """
    for step in sorted(steps_in(path), reverse=True):
        folder = path / str(step)
        problem = damage(folder)
        if problem is None:
            return
        aside = path / f"damaged-{step}"
        if isinstance(folder, Path):
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        else:
            remote.move(str(folder), str(aside))
        print(
            f"checkpoint {folder} is damaged: {problem}. It is set aside as {aside.name}.",
            file=sys.stderr,
            flush=True,
        )


def damage(folder: AnyPath) -> str | None:
    """What is not as it was written in the folder of a step."""
    file = folder / HASHES
    if not file.is_file():
        return None
    try:
        wanted = outside.Fields(outside.parse(file.read_bytes(), str(file)), str(file)).values
        found = _hashes(folder)
    except ValueError as error:
        return str(error)
    for name in sorted(wanted | found):
        if wanted.get(name) != found.get(name):
            what = (
                "is missing" if name not in found else "has changed" if name in wanted else "is new"
            )
            return f"{name} {what}"
    return None


def _hashes(folder: AnyPath) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path in it."""
    if isinstance(folder, Path):
        found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    else:
        found = remote.names(str(folder))
    found = [name for name in found if name.rpartition("/")[2] != HASHES]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda name: _sha256(folder / name), found))
    return dict(zip(found, hashes, strict=True))


def _sha256(path: AnyPath) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """What it logs of a failed save, thread by thread, before it raises the same."""
    return not (record.exc_info and "orbax" in record.pathname)
