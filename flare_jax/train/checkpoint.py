"""Checkpoints of a run: atomic, the last two kept, the best on validation inside each.

A checkpoint holds the whole state (parameters, average, optimizer, step), the best parameters so
far, the sample-order keys and the normalisers, with the configuration beside them as JSON. Orbax
writes it under a temporary name and renames it, so that a process killed in the middle of a save
leaves the one before.
"""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flare_jax.train.config import differences

log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to this run."""


class Checkpoints:
    """The checkpoints in a folder; close it, or use it in a `with` statement."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "config")
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state, config: dict) -> None:
        """Writes one checkpoint; raises CheckpointError, naming the last good one, if it cannot."""
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config)
        )
        last = self.latest
        try:
            self.manager.save(step, args=items)
            self.manager.wait_until_finished()
        except Exception as error:  # a full disk shows as different exceptions by depth
            kept = "there is no earlier one" if last is None else f"step {last} is intact"
            raise CheckpointError(
                f"could not write the checkpoint of step {step} into {self.folder}: {error}; {kept}"
            ) from error

    def restore(self, like, config: dict):
        """The newest checkpoint's state, with the structure, shapes and devices of `like`.

        Raises:
            CheckpointError: there is none, or it was made by another configuration.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"no checkpoint to resume from in {self.folder}")
        saved = self.manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))
        changed = differences(saved["config"], config)
        if changed:
            raise CheckpointError(
                f"the checkpoint in {self.folder} is from another configuration "
                f"(checkpoint -> now):\n  " + "\n  ".join(changed)
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=items)["state"]
