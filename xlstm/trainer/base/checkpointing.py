"""Checkpoints of the train state, written and read by Orbax."""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Self

import jax
import orbax.checkpoint as ocp

from xlstm.common_types import PyTree, TrainState
from xlstm.trainer.base.param_utils import reboxed, unboxed


@contextlib.contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turns whatever storage raises into one OSError that says what failed."""
    try:
        yield
    except Exception as error:  # Orbax and TensorStore raise ValueError, OSError and others.
        raise OSError(f"{what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The operating system's words for a failure, if there are any in a long text."""
    text = " ".join(str(error).split()) or repr(error)
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:300]


def _arrays(state: TrainState) -> PyTree:
    """What a checkpoint holds: names and arrays, no boxes, so that it knows nothing of a mesh."""
    return {
        "params": unboxed(state.params),
        "opt_state": unboxed(state.opt_state),
        "step": state.step,
        "rng": state.rng,
    }


def _check_shapes(wanted: PyTree, saved: PyTree) -> None:
    """Raises ValueError if the parameters of a checkpoint are not those of the model."""
    wanted_shapes, saved_shapes = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (wanted, saved)
    )
    for name in sorted(wanted_shapes.keys() | saved_shapes.keys()):
        here, there = wanted_shapes.get(name), saved_shapes.get(name)
        if here != there:
            raise ValueError(f"{name} has the shape {there} there, {here} in this configuration")


class Checkpointer:
    """Writes checkpoints in the background and finds the last whole one."""

    def __init__(self, directory: str, max_to_keep: int):
        """Opens the folder of a run's checkpoints.

        Args:
            directory: The folder; it is made when the first checkpoint is written.
            max_to_keep: Older checkpoints than the last so many are removed.

        Raises:
            OSError: If the folder cannot be used.
        """
        self._directory = directory
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, enable_async_checkpointing=True
        )
        with _reported(f"the checkpoints in {directory} cannot be opened"):
            self._manager = ocp.CheckpointManager(
                os.path.abspath(directory),
                options=options,
                item_handlers=ocp.StandardCheckpointHandler(),
            )

    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def restore(self, like: TrainState) -> TrainState:
        """Reads the last checkpoint.

        Args:
            like: A state with the shapes and shardings wanted. It is consumed, so that two states
                never need room at once.

        Returns:
            The state that was saved, placed as `like` is.

        Raises:
            OSError: If there is none, or it cannot be read.
        """
        step = self.latest_step()
        if step is None:
            raise OSError(f"there is no checkpoint in {self._directory}")
        like_arrays = _arrays(like)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like_arrays
        )
        with _reported(f"the checkpoint of step {step} in {self._directory} cannot be read"):
            _check_shapes(target["params"], self._manager.item_metadata(step).tree["params"])
            jax.tree.map(lambda x: x.delete(), like_arrays)
            arrays = self._manager.restore(step, args=ocp.args.StandardRestore(target))
        return like.replace(
            params=reboxed(arrays["params"], like.params),
            opt_state=reboxed(arrays["opt_state"], like.opt_state),
            step=arrays["step"],
            rng=arrays["rng"],
        )

    def save(self, step: int, state: TrainState) -> None:
        """Begins to write a checkpoint; training may go on at once.

        Args:
            step: Its step.
            state: The state after that step.

        Raises:
            OSError: If it, or the one before it, cannot be written.
        """
        with _reported(f"a checkpoint cannot be written to {self._directory}"):
            self._manager.save(step, args=ocp.args.StandardSave(_arrays(state)))

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: If the last checkpoint could not be written.
        """
        with _reported(f"a checkpoint cannot be written to {self._directory}"):
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type | None, error: BaseException | None, traceback: object
    ) -> None:
        """Closes; after an error in the block, that one is told and not another from here."""
        reasons = (error, getattr(error, "__cause__", None))
        if jax.process_count() > 1 and any(
            isinstance(reason, jax.errors.JaxRuntimeError) for reason in reasons
        ):
            return  # Another process may have ended: what is being written will never be whole.
        with contextlib.suppress(OSError) if error_type else contextlib.nullcontext():
            self.close()
