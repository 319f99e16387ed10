"""Checkpoints of a run: atomic, the last two kept, the best on validation inside each.

A checkpoint holds the whole state (parameters, average, optimizer, step), the best parameters so
far, the sample-order keys and the normalisers, with the configuration beside them as JSON. Orbax
writes it under a temporary name and renames it, so that a process killed in the middle of a save
leaves the one before. It writes while training goes on: 1,589 arrays for eight blocks take seconds.
"""

import contextlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from flare_jax.train.config import differences


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not belong to this run."""


class Checkpoints:
    """The checkpoints in a folder; close it, or use it in a `with` statement."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self.manager = ocp.CheckpointManager(
            self.folder, options=options, item_names=("state", "config")
        )
        self.begun = self.latest  # step of the newest, whole or being written

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return max(steps_in(self.folder), default=None)

    def save(self, step: int, state, config: dict) -> None:
        """Begins to write a checkpoint, once the one before is whole; raises as `wait` does.

        Returns when the arrays are on the host: steps may take their buffers.
        """
        if step == self.begun:
            return
        self.wait()
        self.begun = step
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(config)
        )
        with self._writing():
            self.manager.save(step, args=items)

    def wait(self) -> None:
        """Until the checkpoint begun is whole.

        Raises:
            CheckpointError: it cannot be; names the last good one.
        """
        with self._writing():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except Exception as error:  # a full disk shows as different exceptions by depth
            last = self.latest
            kept = "there is no earlier one" if last is None else f"step {last} is intact"
            raise CheckpointError(
                f"could not write the checkpoint of step {self.begun} into {self.folder}: {error}; "
                f"{kept}"
            ) from error

    def restore(self, like, config: dict):
        """The newest checkpoint's state, with the structure, shapes and devices of `like`.

        Raises:
            CheckpointError: there is none, or it was made by another configuration.
        """
        step = self.latest
        if step is None:
            raise CheckpointError(f"no checkpoint to resume from in {self.folder}")
        saved = self._read(step, config=ocp.args.JsonRestore())
        changed = differences(saved["config"], config)
        if changed:
            raise CheckpointError(other_configuration(self.folder, changed))
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._read(step, state=ocp.args.StandardRestore(abstract))["state"]

    def _read(self, step: int, **items):
        with readable(self.folder, step):
            return self.manager.restore(step, args=ocp.args.Composite(**items))


def other_configuration(folder: Path, changed: list[str]) -> str:
    """What an error says where a run cannot go on because of these differences."""
    lines = "\n  ".join(changed)
    return f"the run in {folder} is from another configuration (then -> now):\n  {lines}"


def load(folder: Path) -> dict:
    """The newest checkpoint's state, nested dicts of NumPy arrays, wherever it was saved.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    steps = steps_in(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no checkpoint")
    path = Path(folder).absolute() / str(steps[-1]) / "state"
    with readable(folder, steps[-1]):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True)
        metadata = handler.metadata(path)
        as_arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_arrays))


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, in order: those half written have other names."""
    return sorted(int(path.name) for path in Path(folder).glob("*") if path.name.isdecimal())


@contextlib.contextmanager
def readable(folder: Path, step: int):
    """Turns whatever reading a damaged checkpoint raises into an error that says what to do."""
    try:
        yield
    except Exception as error:  # missing, cut and overwritten files show as different ones
        path = Path(folder).absolute() / str(step)
        earlier = [s for s in steps_in(folder) if s < step]
        kept = f"from step {earlier[-1]}" if earlier else "from the start, there is no earlier one"
        raise CheckpointError(
            f"the checkpoint {path} is damaged: {error}; move it away to go on {kept}"
        ) from error
