"""Restoring a run from its checkpoints, and checking at its end where it would resume."""

from typing import Any

import jax

from xlstm.common_types import TrainState
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.read_params import read_run_info
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.prepare_run import PreparedRun
from xlstm.trainer.llm.run_tokenizer import write_tokenizer
from xlstm.trainer.llm.workdir import run_info, write_config
from xlstm.trainer.logger.base_logger import Logger

# Fields that decide, with the text of the stores, what each row of a batch reads.
_ROW_FIELDS = ("batch_size", "context_length", "validation_fraction")


def open_checkpointer(run: PreparedRun) -> Checkpointer:
    """Opens the checkpoints of a run; the caller closes the result."""
    trainer = run.config.trainer
    return Checkpointer(
        run.workdir.checkpoints,
        max_to_keep=trainer.max_checkpoints,
        keep_period=trainer.keep_checkpoint_interval,
        keep_best=trainer.keep_best_checkpoint,
        only_confirmed=trainer.confirm_steps > 0,
        run_info=run_info(run.config, run.data.checksums, run.tokenizer, run.code, run.mesh.shape),
        report=run.say,
    )


def resume(
    run: PreparedRun, checkpointer: Checkpointer, state: TrainState
) -> tuple[TrainState, int]:
    """Restores the last confirmed checkpoint, if there is one.

    Writes the run's configuration and tokenizer into its folder.

    Args:
        run: The run.
        checkpointer: The run's checkpoints.
        state: The state of a new run; it is consumed if there is a checkpoint.

    Returns:
        The state to train from, and the number of steps that it has taken.

    Raises:
        OSError: If there are checkpoints, but none is both confirmed and complete.
    """
    restored = _restore(run, checkpointer, state)
    step = 0
    if restored:
        state, step, info = restored
        run.say(f"resuming from step {step:,}, the last confirmed checkpoint in {run.workdir.path}")
        changes = [
            f"{name} was {info['code'].get(name)}, is {version}"
            for name, version in run.code.items()
            if info["code"].get(name) != version
        ]
        if changes:
            run.say(f"another version of the code wrote it: {'; '.join(changes)}")
        row_changes = _row_changes(run, info)
        if run.config.data.carry_state and row_changes:
            run.say(f"all rows start with the zero state: {'; '.join(row_changes)}")
    if jax.process_index() == 0:
        write_config(run.workdir, run.config, run.data.checksums)
        write_tokenizer(run.workdir, run.tokenizer, run.source and run.source[0])
    return state, step


def roll_back(
    run: PreparedRun, logger: Logger, checkpointer: Checkpointer, step: int, state: TrainState
) -> TrainState:
    """Restores the last confirmed checkpoint, and counts the lost steps as skipped.

    Args:
        run: The run.
        logger: Logger of `rolled_back_to`, the step of the checkpoint.
        checkpointer: The run's checkpoints.
        step: The bad step.
        state: The current state; it is consumed.

    Returns:
        The checkpoint's parameters and optimizer state, as the state after `step`. A carried state
        starts over.

    Raises:
        ValueError: If there is no checkpoint yet.
    """
    # The rows have gone on to other documents meanwhile.
    restored = _restore(run, checkpointer, state, restart_rows=True)
    if restored is None:
        raise ValueError(
            f"step {step} cannot be rolled back, since there is no checkpoint yet: start again with"
            " a lower schedule.peak_lr"
        )
    state, saved_step, _ = restored
    logger.log(step, {"rolled_back_to": saved_step})
    lost = step - saved_step
    return state.replace(step=state.step + lost, skipped_steps=state.skipped_steps + lost)


def check_end(run: PreparedRun, checkpointer: Checkpointer, step: int) -> bool:
    """Returns whether a run has done all of its steps; if not, says where it resumes.

    Raises:
        ValueError: If all steps are done, but the last checkpoint is not confirmed.
    """
    num_steps, confirmed = run.config.trainer.num_steps, checkpointer.confirmed_step()
    is_confirmed = confirmed == step or not run.config.trainer.confirm_steps
    if step < num_steps:
        if is_confirmed:
            what_next = "the same command resumes from there"
        elif confirmed is None:
            what_next = (
                "no checkpoint is confirmed; set trainer.confirm_steps=0 to resume from it, or"
                " start in another --workdir, for example with a lower schedule.peak_lr"
            )
        else:
            what_next = f"the same command resumes from step {confirmed:,}, the last confirmed one"
        run.say(f"stopped after step {step:,}, which is saved in {run.workdir.path}: {what_next}")
        return False
    if not is_confirmed:
        last = "none is" if confirmed is None else f"the last one that is: step {confirmed:,}"
        raise ValueError(
            f"{step:,} steps are done, but the last ones were not sound, and their checkpoint is"
            f" not confirmed ({last}): lower schedule.peak_lr or optimizer.grad_clip_norm, or name"
            " the checkpoint itself to use it as it is"
        )
    return True


def _restore(
    run: PreparedRun, checkpointer: Checkpointer, state: TrainState, restart_rows: bool = False
) -> tuple[TrainState, int, dict[str, Any]] | None:
    """Restores the last confirmed checkpoint, and its record of the steps before it.

    A carried state starts over with `restart_rows`, or if the rows read other text than before.

    Returns:
        The state, its step and its `run_info`; None if there is no checkpoint.
    """
    with run.clock.phase("checkpoint"):
        step = checkpointer.discard_unusable()
        if step is None:
            return None
        info = read_run_info(run.workdir.checkpoints, step)
        carried = CarriedState.of_run(run.config)
        if carried and (restart_rows or _row_changes(run, info)):
            state = checkpointer.restore(state.replace(carried_state=None))
            state = state.replace(carried_state=carried.create(run.mesh))
        else:
            state = checkpointer.restore(state)
        # Losses on other data do not predict those to come.
        is_same_data = info["corpora"] == run.data.checksums
        run.soundness.from_dict(checkpointer.soundness(step) if is_same_data else None)
    return state, step, info


def _row_changes(run: PreparedRun, info: dict[str, Any]) -> list[str]:
    """Returns why rows do not continue where a checkpoint left them; empty if they do."""
    before, now = info["config"]["data"], run.config.data
    changes = [
        f"data.{name} was {before[name]!r}, is {getattr(now, name)!r}"
        for name in _ROW_FIELDS
        if before[name] != getattr(now, name)
    ]
    if info["corpora"] != run.data.checksums:
        changes.append("the token stores hold other text")
    return changes
