"""Checkpoints of the train state, written and read by Orbax, and checked by checksums."""

import contextlib
import dataclasses
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from xlstm.common_types import TrainState
from xlstm.trainer.base.multihost import (
    from_first_process,
    in_first_process,
)
from xlstm.trainer.checkpoints.arrays import (
    arrays_to_read,
    fill_average,
    named_arrays,
    stored_arrays,
    with_arrays,
)
from xlstm.trainer.checkpoints.checksums import find_damage
from xlstm.trainer.checkpoints.folder import (
    CheckpointFolder,
    Retention,
    Saved,
    best_step,
    confirmed_step,
)
from xlstm.trainer.checkpoints.storage import (
    ITEM,
    array_handler,
    reported,
    restore_arguments,
    save_arguments,
    storage_error,
)

_UNCONFIRMED = "unconfirmed_checkpoints"


class Checkpointer:
    """Writes checkpoints in the background, and reads those that are whole.

    A checkpoint counts once the checksums of all its files are written; only then are older ones
    removed, and of those never the last one that is confirmed. After a failure in the background
    every method but those that return what is known raises. In a run of several processes every one
    has its own and calls the same methods; the first one speaks and changes files that belong to
    none.
    """

    def __init__(
        self,
        directory: str,
        *,
        max_to_keep: int = 2,
        keep_interval: int = 0,
        keep_best: bool = False,
        only_confirmed: bool = True,
        run_info: dict[str, Any] | None = None,
        report: Callable[[str], None] = lambda text: None,
    ):
        """Opens the folder of a run's checkpoints, and makes it if it is not there.

        Args:
            directory: The folder.
            max_to_keep: The last so many checkpoints are kept.
            keep_interval: Those of steps that it divides are kept for ever; 0 for none.
            keep_best: Whether that with the lowest validation loss is kept, too.
            only_confirmed: Whether a run goes on from confirmed checkpoints only.
            run_info: What is to be known of the run, saved with each; JSON must be able to hold it.
            report: Takes sentences for the user, from any thread, in the first process only.

        Raises:
            OSError: If the folder cannot be used.
        """
        self._folder = CheckpointFolder(directory)
        self._retention = Retention(max_to_keep, keep_interval, keep_best)
        self._only_confirmed = only_confirmed
        self._run_info, self._report = run_info or {}, report
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        with reported(f"the checkpoints in {directory} cannot be opened"):
            self._saved = self._open_folder()
            # Folders are made at once: if they cannot be, Orbax's threads would wait for them.
            options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
            self._orbax = ocp.AsyncCheckpointer(array_handler(), async_options=options)

    def _open_folder(self) -> dict[int, Saved]:
        """Makes the folder, or finds what is in it; every process keeps the same books."""

        def read() -> list[tuple[int, dict[str, Any]]]:
            os.makedirs(self._folder.path, exist_ok=True)
            saved = self._folder.saved()
            return [(step, dataclasses.asdict(saved[step])) for step in saved]

        return {step: Saved(**fields) for step, fields in from_first_process(read)}

    def discard_unusable(self) -> int | None:
        """Looks for the newest checkpoint that a run can go on from.

        It is confirmed, and every byte of it is as it was written. Newer ones are moved to
        `unconfirmed_checkpoints` and `damaged_checkpoints` beside the folder. What a killed run was
        still writing is removed.

        Returns:
            The step of that checkpoint, now the last one; None if there was none at all.

        Raises:
            OSError: If there are checkpoints, but none such: they stay where they are. Or something
                cannot be read or moved.
        """
        self.wait()
        step = from_first_process(self._discard_unusable)
        self._saved = self._open_folder()
        return step

    def _discard_unusable(self) -> int | None:
        folder, unconfirmed, damages = self._folder, [], {}
        with reported(f"the checkpoints in {folder.path} cannot be checked"):
            self._remove_leftovers()
            steps, saved = folder.steps(), folder.saved()
            while steps:
                step = steps[-1]
                if self._only_confirmed and not saved.get(step, Saved()).confirmed:
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
        with reported(f"a checkpoint in {folder.path} cannot be moved away"):
            if unconfirmed:
                # Each start may come this far: those of the last one are enough.
                folder.forget_aside(_UNCONFIRMED)
            for step in unconfirmed:
                path = folder.set_aside(step, _UNCONFIRMED)
                self._report(
                    f"the checkpoint of step {step} is not confirmed, since steps before it were"
                    f" not sound: it is moved to {path}, and that of step {steps[-1]} is used"
                )
            for step, damage in damages.items():
                path = folder.set_aside(step, "damaged_checkpoints")
                self._report(
                    f"the checkpoint of step {step} is damaged ({damage}): it is moved to {path},"
                    f" and that of step {steps[-1]} is used"
                )
        return steps[-1]

    def _find_damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint; see `find_damage`."""
        folder = self._folder.of_step(step)
        damage = find_damage(folder)
        if damage is None:
            try:
                stored_arrays(self._arrays_path(folder))
            except Exception as error:  # Whatever storage raises; its files are as written.
                damage = storage_error(error)
        return damage

    def _remove_leftovers(self) -> None:
        try:
            for step in self._folder.remove_leftovers():
                self._report(f"the checkpoint of step {step} was not finished: it is removed")
        except OSError as error:  # They do not count, so they do no harm.
            self._report(f"what is left of a checkpoint cannot be removed ({error})")

    def latest_step(self) -> int | None:
        """The step of the last whole checkpoint; None if there is none."""
        return max(self._saved, default=None)

    def confirmed_step(self) -> int | None:
        """The step of the last checkpoint that is confirmed; None if none is."""
        return confirmed_step(self._saved)

    def soundness(self, step: int) -> dict[str, Any] | None:
        """What `save` was told of the steps up to a checkpoint; None if that is not known."""
        return self._saved[step].soundness

    def best_loss(self) -> float | None:
        """The lowest validation loss of the confirmed checkpoints; None if none is known."""
        step = best_step(self._saved)
        return None if step is None else self._saved[step].val_loss

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """Reads a checkpoint.

        Args:
            like: A state with the shapes and shardings wanted. It is consumed, so that two states
                never need room at once.
            step: The checkpoint's step; by default that of the last one.

        Returns:
            The state that was saved, placed as `like` is. An average of the parameters that is
            wanted, but was not saved, begins as a copy of them.

        Raises:
            OSError: If there is none, or it cannot be read, or is of another model or optimizer.
        """
        self.wait()
        found = self.latest_step() if step is None else step
        if found not in self._saved:
            which = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise OSError(f"there is {which} in {self._folder.path}")
        with reported(f"the checkpoint of step {found} in {self._folder.path} cannot be read"):
            return self._restore(like, self._arrays_path(self._folder.of_step(found)))

    def _restore(self, like: TrainState, path: str) -> TrainState:
        like_arrays = named_arrays(like)
        wanted = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            for name, x in like_arrays.items()
        }
        target = arrays_to_read(wanted, stored_arrays(path))
        for array in like_arrays.values():
            array.delete()
        arrays = self._orbax.restore(path, args=restore_arguments(target))
        return with_arrays(like, fill_average(wanted, arrays))

    @staticmethod
    def _arrays_path(folder: str) -> str:
        return os.path.join(os.path.abspath(folder), ITEM)

    def save(
        self,
        step: int,
        state: TrainState,
        val_loss: float | None = None,
        *,
        confirmed: bool = True,
        soundness: dict[str, Any] | None = None,
    ) -> None:
        """Begins to write a checkpoint; training may go on at once.

        It waits for the one before it.

        Args:
            step: Its step, of which there is no checkpoint yet.
            state: The state after that step.
            val_loss: Its validation loss, if it is known; one that is not a finite number is not.
            confirmed: Whether a run may go on from it, see `Soundness.confirms`.
            soundness: See `Soundness.to_dict`.

        Raises:
            OSError: If it, or the one before it, cannot be written.
        """
        self.wait()
        with self._writing():
            if jax.process_index() == 0:
                self._folder.begin(step)
            arrays, path = named_arrays(state), self._arrays_path(self._folder.unfinished(step))
            self._orbax.save(path, args=save_arguments(arrays))
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
        is_known = val_loss is not None and math.isfinite(val_loss)
        saved = Saved(
            val_loss=float(val_loss) if is_known else None,
            for_ever=self._retention.is_for_ever(step),
            confirmed=confirmed,
            soundness=soundness,
        )
        self._thread = threading.Thread(target=self._finish, args=(step, saved, shapes))
        self._thread.start()

    def _finish(self, step: int, saved: Saved, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """What is to be done in the background once Orbax has begun."""

        def complete() -> list[int]:
            self._check_written(step, shapes)
            self._folder.complete(step, self._run_info, saved)
            return self._find_gone()

        try:
            self._orbax.wait_until_finished()
            gone = in_first_process(f"checkpoint_{step}", complete)
            there = {step: self._saved[step] for step in self._saved if step not in gone}
            known = there | {step: saved}
            # Every process keeps the same books; replaced at once, so that no lock is needed.
            self._saved = self._retention.kept(known)
            if jax.process_index() == 0:
                self._remove(known.keys() - self._saved.keys())
        except Exception as error:  # As above; it is raised where the training sees it.
            self._error = error

    def _find_gone(self) -> list[int]:
        """The steps of checkpoints that somebody else has removed."""
        gone = sorted(self._saved.keys() - set(self._folder.steps()))
        if gone:
            self._report(
                f"{self._folder.path} has lost checkpoints that this run did not remove, of step"
                f" {', '.join(map(str, gone))}"
            )
        return gone

    def _check_written(self, step: int, shapes: Mapping[str, jax.ShapeDtypeStruct]) -> None:
        """Raises an error if what all processes have written cannot be read."""
        try:
            stored_arrays(self._arrays_path(self._folder.unfinished(step)), shapes)
        except Exception as error:
            hint = "; do all processes see the same folder?" if jax.process_count() > 1 else ""
            raise OSError(
                f"what was written cannot be read: {storage_error(error)}{hint}"
            ) from error

    def _remove(self, steps: Iterable[int]) -> None:
        """Removes old checkpoints; that one stays is no reason to end a run."""
        try:
            self._folder.remove(steps)
        except OSError as error:
            self._report(f"an old checkpoint cannot be removed ({error})")

    def check(self) -> None:
        """Raises OSError if a checkpoint could not be written; costs next to nothing."""
        if self._error is not None:
            with self._writing():
                raise self._error

    def wait(self) -> None:
        """Waits until everything is written, checksums too.

        Raises:
            OSError: If a checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: If a checkpoint could not be written.
        """
        try:
            self.wait()
        finally:
            with self._writing():
                self._orbax.close()

    def _writing(self) -> contextlib.AbstractContextManager:
        return reported(f"a checkpoint cannot be written to {self._folder.path}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type | None, error: BaseException | None, traceback: object
    ) -> None:
        """Closes; after an error in the block, that one is told and not another from here."""
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            # Another process may have ended: what is being written will never be whole. But if
            # it ended because a checkpoint failed, this process knows.
            self.check()
            return
        with contextlib.suppress(OSError) if error_type else contextlib.nullcontext():
            self.close()
