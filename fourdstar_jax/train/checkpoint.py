"""Checkpoints: training state, step and data iterator together, through Orbax (only here)."""

import os
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

    A save is visible only when it is complete (Orbax writes aside and renames).
    """

    def __init__(self, workdir: str | os.PathLike[str], *, every: int, keep: int = 2):
        options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=keep)
        path = Path(workdir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(path, options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self, step: int, state: TrainState, iterator: grain.DatasetIterator, *, force: bool = False
    ) -> None:
        """Saves after `step` steps when that is due, or when forced; files are written later on."""
        if step == self._manager.latest_step():
            return
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
        step = self._manager.latest_step()
        if step is None:
            return state, iterator
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, _flatten(state))
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
        self._manager.wait_until_finished()
        self._manager.close()
