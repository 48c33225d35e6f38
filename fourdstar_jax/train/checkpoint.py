"""Checkpoints: training state, step and data iterator together, through Orbax (only here)."""

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from fourdstar_jax.train.state import TrainState


def _flatten(tree: Any) -> dict[str, Any]:
    """Leaves by their path: checkpoints do not depend on the classes of the containers."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


class Checkpoints:
    """Saves every `every` steps into `<workdir>/checkpoints`, keeps `keep`, restores the newest.

    A save is visible only when it is complete (Orbax writes aside and renames). One that fails, as
    on a full disk, raises ValueError at the next save or at the end; those before it stay. Which
    there are is asked of the disk: Orbax forgets some after a failure.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, every: int, keep: int = 2):
        options = ocp.CheckpointManagerOptions(
            save_interval_steps=every, max_to_keep=keep, cleanup_tmp_directories=True
        )
        self._path = Path(workdir).resolve() / "checkpoints"
        logging.getLogger("absl").addFilter(_is_no_traceback_of_orbax)
        with self._explained("cannot be opened"):
            self._manager = ocp.CheckpointManager(self._path, options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint on the disk."""
        return max(ocp.utils.checkpoint_steps(self._path), default=None)

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, force: bool = False
    ) -> None:
        """Saves after `step` steps when that is due, or when forced; files are written later on."""
        if step == self.latest_step():
            return
        with self._explained("cannot be written"):
            self._manager.check_for_errors()  # of the save before
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flatten(state)),
                    data=grain.checkpoint.CheckpointSave(iterator),
                ),
                force=force,
            )

    def restore(
        self, state: TrainState, iterator: grain.DatasetIterator
    ) -> tuple[TrainState, grain.DatasetIterator]:
        """The newest checkpoint laid out as `state` is; `state` itself where there is none."""
        step = self.latest_step()
        if step is None:
            return state, iterator
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flatten(state))
        with self._explained(f"of step {step} do not fit this config and its data"):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                ),
            )
        leaves = [restored["state"][name] for name in _flatten(state)]
        return jax.tree.unflatten(jax.tree.structure(state), leaves), restored["data"]

    def close(self) -> None:
        """Waits until the last save is complete; raises what went wrong in it."""
        with self._explained("cannot be written"):
            self._manager.wait_until_finished()
            self._manager.close()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Whatever Orbax and what it stands on raise as one line."""
        try:
            yield
        except Exception as error:
            line = " ".join(str(error).split())
            line = line if len(line) < 400 else f"{line[:200]} ... {line[-180:]}"
            raise ValueError(f"checkpoints in {self._path} {what}: {line}") from error


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """What it logs of a failed save, thread by thread, before it raises the same."""
    return not (record.exc_info and "orbax" in record.pathname)
