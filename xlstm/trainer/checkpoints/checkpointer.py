"""Asynchronous checkpoints of the train state: written and read by Orbax, checked by checksums."""

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from xlstm.common_types import TrainState
from xlstm.trainer.base.multihost import broadcast_from_process_0, run_on_process_0
from xlstm.trainer.checkpoints.arrays import (
    arrays_to_read,
    fill_missing,
    named_arrays,
    read_array_metadata,
    with_arrays,
)
from xlstm.trainer.checkpoints.checksums import find_damage
from xlstm.trainer.checkpoints.folder import (
    CheckpointFolder,
    CheckpointMetadata,
    Retention,
    best_step,
    confirmed_step,
)
from xlstm.trainer.checkpoints.storage import (
    STATE_DIR,
    array_handler,
    as_os_error,
    restore_arguments,
    save_arguments,
    storage_error,
)

_UNCONFIRMED, _DAMAGED = "unconfirmed_checkpoints", "damaged_checkpoints"


class Checkpointer:
    """A checkpointer that writes in the background and restores complete checkpoints.

    A checkpoint counts once the checksums of all its files are written. Only then are older ones
    removed, and never the latest confirmed one. After a failure in the background every method
    raises, except for those that only return what is known.

    In a run of several processes each has its own `Checkpointer` and calls the same methods.
    Process 0 reports, and changes the files that belong to no single process.
    """

    def __init__(
        self,
        directory: str,
        *,
        max_to_keep: int = 2,
        keep_period: int = 0,
        keep_best: bool = False,
        only_confirmed: bool = True,
        run_info: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
    ):
        """Opens the folder of a run's checkpoints; creates it if necessary.

        Args:
            directory: The folder.
            max_to_keep: See `Retention`.
            keep_period: See `Retention`.
            keep_best: See `Retention`.
            only_confirmed: Whether a run resumes only from confirmed checkpoints.
            run_info: Facts about the run, saved with each checkpoint; JSON must be able to
                represent them.
            report: Shows a sentence to the user; called from any thread, only in process 0.

        Raises:
            OSError: If the folder cannot be used.
        """
        self._folder = CheckpointFolder(directory)
        self._retention = Retention(max_to_keep, keep_period, keep_best)
        self._only_confirmed = only_confirmed
        self._run_info, self._report = run_info or {}, report
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        with as_os_error(f"the checkpoints in {directory} cannot be opened"):
            self._metadata = self._open_folder()
            # If a folder cannot be created, Orbax's threads would wait for it without end.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            self._orbax = ocp.AsyncCheckpointer(array_handler(), async_options=options)

    def _open_folder(self) -> dict[int, CheckpointMetadata]:
        """Creates the folder or reads its metadata; returns the same in every process."""

        def read() -> list[tuple[int, dict[str, Any]]]:
            os.makedirs(self._folder.path, exist_ok=True)
            return [(step, x.to_dict()) for step, x in self._folder.metadata().items()]

        found = broadcast_from_process_0(read)
        return {step: CheckpointMetadata.from_dict(x) for step, x in found}

    def latest_step(self) -> int | None:
        """Returns the step of the latest complete checkpoint; None if there is none."""
        return max(self._metadata, default=None)

    def confirmed_step(self) -> int | None:
        """Returns the step of the latest confirmed checkpoint; None if there is none."""
        return confirmed_step(self._metadata)

    def soundness(self, step: int) -> dict[str, Any] | None:
        """Returns the `soundness` that was saved with a checkpoint; None if unknown."""
        return self._metadata[step].soundness

    def best_loss(self) -> float | None:
        """Returns the lowest validation loss of the confirmed checkpoints; None if unknown."""
        step = best_step(self._metadata)
        return None if step is None else self._metadata[step].val_loss

    def discard_unusable(self) -> int | None:
        """Finds the latest checkpoint to resume from: confirmed, and with every byte as written.

        Moves later checkpoints to `unconfirmed_checkpoints` and `damaged_checkpoints` beside the
        folder. Removes what a killed run left unfinished.

        Returns:
            The step of that checkpoint, which is now the latest; None if there are no checkpoints.

        Raises:
            OSError: If there are checkpoints but none is usable, in which case all stay where they
                are; or if a file cannot be read or moved.
        """
        self.wait_until_finished()
        step = broadcast_from_process_0(self._discard_unusable)
        self._metadata = self._open_folder()
        return step

    def _discard_unusable(self) -> int | None:
        folder, unconfirmed, damages = self._folder, [], {}
        with as_os_error(f"the checkpoints in {folder.path} cannot be checked"):
            self._remove_leftovers()
            steps, metadata = folder.steps(), folder.metadata()
            while steps:
                step = steps[-1]
                if self._only_confirmed and not metadata.get(step, CheckpointMetadata()).confirmed:
                    unconfirmed.append(step)
                elif damage := self._find_damage(step):
                    damages[step] = damage
                else:
                    break
                steps.pop()
        if not steps:
            if unconfirmed or damages:
                raise OSError(folder.describe_unusable(unconfirmed, damages))
            return None
        with as_os_error(f"a checkpoint in {folder.path} cannot be moved"):
            self._set_aside(unconfirmed, damages, used=steps[-1])
        return steps[-1]

    def _set_aside(self, unconfirmed: list[int], damages: Mapping[int, str], used: int) -> None:
        """Moves unusable checkpoints out of the folder, and reports each."""
        if unconfirmed:
            # Every start may set some aside: keep only the latest.
            self._folder.clear_set_aside(_UNCONFIRMED)
        for step in unconfirmed:
            path = self._folder.set_aside(step, _UNCONFIRMED)
            self._report(
                f"the checkpoint of step {step} is not confirmed, since steps before it were not"
                f" sound: moved it to {path}; using the checkpoint of step {used}"
            )
        for step, damage in damages.items():
            path = self._folder.set_aside(step, _DAMAGED)
            self._report(
                f"the checkpoint of step {step} is damaged ({damage}): moved it to {path}; using"
                f" the checkpoint of step {used}"
            )

    def _find_damage(self, step: int) -> str | None:
        """Returns what is wrong with a checkpoint, see `find_damage`; None if nothing is."""
        folder = self._folder.step_dir(step)
        damage = find_damage(folder)
        if damage is None:
            try:
                read_array_metadata(self._arrays_path(folder))
            except Exception as error:  # Storage may raise anything, though no file has changed.
                damage = storage_error(error)
        return damage

    def _remove_leftovers(self) -> None:
        try:
            for step in self._folder.remove_leftovers():
                self._report(f"removed the checkpoint of step {step}, which was not finished")
        except OSError as error:  # Leftovers do no harm: they do not count as checkpoints.
            self._report(f"leftovers of a checkpoint cannot be removed ({error})")

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint.

        Args:
            like: A state with the shapes and shardings wanted. It is consumed, so that memory never
                holds two states.
            step: The checkpoint's step; None for the latest one.

        Returns:
            The saved state, sharded like `like`. If `like` has a moving average of the parameters
            but the checkpoint has none, the average starts as a copy of the parameters.

        Raises:
            OSError: If there is no such checkpoint, it cannot be read, or it is from another model
                or optimizer.
        """
        self.wait_until_finished()
        found = self.latest_step() if step is None else step
        if found not in self._metadata:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise OSError(f"there is {which} in {self._folder.path}")
        with as_os_error(f"the checkpoint of step {found} in {self._folder.path} cannot be read"):
            return self._restore(like, self._arrays_path(self._folder.step_dir(found)))

    def _restore(self, like: TrainState, path: str) -> TrainState:
        like_arrays = named_arrays(like)
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in like_arrays.items()
        }
        target = arrays_to_read(wanted, read_array_metadata(path))
        for array in like_arrays.values():
            array.delete()
        arrays = self._orbax.restore(path, args=restore_arguments(target))
        return with_arrays(like, fill_missing(wanted, arrays))

    @staticmethod
    def _arrays_path(folder: str) -> str:
        return os.path.join(os.path.abspath(folder), STATE_DIR)

    def save(
        self,
        step: int,
        state: TrainState,
        val_loss: float | None = None,
        *,
        confirmed: bool = True,
        soundness: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint; training may continue at once.

        Waits for the previous checkpoint first.

        Args:
            step: Its step, which must have no checkpoint yet.
            state: The state after that step.
            val_loss: Its validation loss, if known; a value that is not finite counts as unknown.
            confirmed: Whether a run may resume from it, see `Soundness.confirms`.
            soundness: See `Soundness.to_dict`.

        Raises:
            OSError: If this checkpoint, or the previous one, cannot be written.
        """
        self.wait_until_finished()
        with self._writing():
            if jax.process_index() == 0:
                self._folder.begin(step)
            arrays, path = named_arrays(state), self._arrays_path(self._folder.unfinished_dir(step))
            self._orbax.save(path, args=save_arguments(arrays))
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
        is_known = val_loss is not None and math.isfinite(val_loss)
        metadata = CheckpointMetadata(
            val_loss=float(val_loss) if is_known else None,
            permanent=self._retention.is_permanent(step),
            confirmed=confirmed,
            soundness=soundness,
        )
        self._thread = threading.Thread(target=self._finish, args=(step, metadata, shapes))
        self._thread.start()

    def _finish(
        self, step: int, metadata: CheckpointMetadata, shapes: Mapping[str, jax.ShapeDtypeStruct]
    ) -> None:
        """Completes a checkpoint in the background after Orbax has started to write."""

        def complete() -> list[int]:
            self._check_written(step, shapes)
            self._folder.finalize(step, self._run_info, metadata)
            return self._find_lost()

        try:
            self._orbax.wait_until_finished()
            lost = run_on_process_0(f"checkpoint_{step}", complete)
            known = {step: self._metadata[step] for step in self._metadata if step not in lost}
            known |= {step: metadata}
            # The same in every process; replaced in one assignment, so that no lock is needed.
            self._metadata = self._retention.kept(known)
            if jax.process_index() == 0:
                self._remove(known.keys() - self._metadata.keys())
        except Exception as error:  # Storage may raise anything; `check_for_errors` raises it.
            self._error = error

    def _find_lost(self) -> list[int]:
        """Returns the steps of checkpoints that somebody else has removed."""
        lost = sorted(self._metadata.keys() - set(self._folder.steps()))
        if lost:
            self._report(
                f"{self._folder.path} has lost checkpoints that this run did not remove, of step"
                f" {', '.join(map(str, lost))}"
            )
        return lost

    def _check_written(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Raises OSError if the arrays that all processes have written cannot be read."""
        try:
            read_array_metadata(self._arrays_path(self._folder.unfinished_dir(step)), shapes)
        except Exception as error:
            hint = "; do all processes see the same folder?" if jax.process_count() > 1 else ""
            raise OSError(f"reading it back failed: {storage_error(error)}{hint}") from error

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes old checkpoints; a failure is no reason to end a run."""
        try:
            self._folder.remove(steps)
        except OSError as error:
            self._report(f"an old checkpoint cannot be removed ({error})")

    def check_for_errors(self) -> None:
        """Raises OSError if a checkpoint could not be written; takes almost no time."""
        if self._error is not None:
            with self._writing():
                raise self._error

    def wait_until_finished(self) -> None:
        """Waits until everything is written, including checksums.

        Raises:
            OSError: If a checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check_for_errors()

    def close(self) -> None:
        """Waits until everything is written, and releases Orbax's resources.

        Raises:
            OSError: If a checkpoint could not be written.
        """
        try:
            self.wait_until_finished()
        finally:
            with self._writing():
                self._orbax.close()

    def _writing(self) -> contextlib.AbstractContextManager:
        return as_os_error(f"a checkpoint cannot be written to {self._folder.path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type | None, error: BaseException | None, traceback: object
    ) -> None:
        """Closes; an exception raised in the block takes precedence over one raised here."""
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            # Another process may have ended, so the current write will never finish. If it ended
            # because a checkpoint failed, this process knows the reason.
            self.check_for_errors()
            return
        with contextlib.suppress(OSError) if error_type else contextlib.nullcontext():
            self.close()
