"""Trains a language model; from top to bottom as a run goes."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from xlstm.common_types import Metrics, TrainState
from xlstm.dataset.batch import Batch
from xlstm.dataset.store_guard import StoreGuard
from xlstm.trainer.base.clock import report_waits, watchdog
from xlstm.trainer.base.multihost import sync_processes
from xlstm.trainer.base.param_utils import tabulate_params
from xlstm.trainer.base.signals import on_stop_signal
from xlstm.trainer.base.trainer import Callback, fit
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm.callbacks import create_callbacks, metrics_to_scalars
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import batch_share, global_batches
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.language_model import create_training, start_from
from xlstm.trainer.llm.loggers import create_loggers
from xlstm.trainer.llm.prepare_run import PreparedRun, prepare_run
from xlstm.trainer.llm.resume import open_checkpointer, resume
from xlstm.trainer.llm.workdir import Workdir, own_workdir
from xlstm.trainer.logger.base_logger import Loggers
from xlstm.trainer.logger.terminal import mesh_line


@dataclasses.dataclass(frozen=True)
class TrainingRun(PreparedRun):
    """A run that is ready for its next step.

    Attributes:
        state: The state after `start_step` steps; training consumes it.
        start_step: Steps done before.
        compiled_step: The training step, of state, batch and the requests of the processes.
        checkpointer: Writes the checkpoints.
        callbacks: What happens beside the steps.
    """

    state: TrainState
    start_step: int
    compiled_step: Callable[..., tuple[TrainState, Metrics]]
    checkpointer: Checkpointer
    callbacks: Sequence[Callback]

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a training step; the state is consumed."""
        return self.compiled_step(state, batch, self.requests.current())

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Yields the global batches that follow a number of steps."""
        batches = self.data.train_batches(start_step=step, **batch_share(self.mesh))
        return global_batches(batches, self.mesh)


def train_language_model(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
    sample: Callable[[TrainingRun, TrainState], str] | None = None,
) -> None:
    """Trains a new run, or resumes from the last checkpoint in the run's folder.

    SIGTERM and SIGINT end it early, after a checkpoint.

    Args:
        config: What to do.
        workdir_path: The run's folder; it is created if it does not exist.
        allow_config_change: Whether to resume a run that began with another configuration.
        verify_data: Whether to verify token stores first that are large, or were verified before.
        sample: Writes text with the trained model, to be shown at the end; None for no text.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data or the folder,
            or if training diverges, or ends in steps that are not sound.
        OSError: If something cannot be read or written.
    """
    with open_training(
        config, workdir_path, allow_config_change=allow_config_change, verify_data=verify_data
    ) as run:
        state = fit(
            run.state,
            run.batches_from,
            run.train_step,
            start_step=run.start_step,
            num_steps=max(config.trainer.num_steps, run.start_step),
            callbacks=run.callbacks,
            clock=run.clock,
            to_scalars=metrics_to_scalars,
        )
    if _is_done(run, int(state.step)):
        if sample:
            run.say(f"{' a sample ':─^80}")
            run.say(f"{sample(run, state)}\n{'':─^80}")
        run.say(f"{int(state.step):,} steps done; everything is in {workdir_path}")


@contextlib.contextmanager
def open_training(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
) -> Iterator[TrainingRun]:
    """Opens a run's folder, and brings everything to where the run was.

    Inside, the folder belongs to this process alone, and SIGTERM and SIGINT ask for a stop. At the
    end everything is written.

    Args:
        config: See `train_language_model`, as for the other arguments.
        workdir_path: The run's folder.
        allow_config_change: Whether to resume with another configuration.
        verify_data: Whether to verify token stores first.

    Yields:
        The run.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data or the folder.
        OSError: If something cannot be read or written.
    """
    with contextlib.ExitStack() as stack:
        # Data. Whatever can be checked is checked before anything is made.
        run = prepare_run(config, workdir_path, allow_config_change)
        run.say(mesh_line(run.mesh))
        stack.enter_context(report_waits(run.clock, run.say))
        guard = StoreGuard(run.stores, run.say)
        guard.verify_first(verify_data)
        sync_processes("stores")

        # Model: new parameters, or those of another run.
        state, specs, compiled_step = create_training(run.config, run.mesh)
        if run.source:
            begin = functools.partial(_start_from, run, state)
            state = read_checkpoint(run.config.trainer.init_from, begin, run.say)
        run.say(_describe(run, state))

        # Resume. From here on the folder and its files are this run's.
        stack.enter_context(own_workdir(run.workdir))
        stack.enter_context(watchdog(run.clock, run.config.trainer.stall_seconds, _warn))
        stack.enter_context(on_stop_signal(run.stop))
        stack.enter_context(guard)
        checkpointer = stack.enter_context(open_checkpointer(run))
        state, start_step = resume(run, checkpointer, state)

        # Callbacks: logging, evaluation, checkpoints.
        loggers = create_loggers(run, start_step)
        stack.enter_context(_closing(loggers))
        callbacks = create_callbacks(run, state, specs, loggers, checkpointer)
        for callback in callbacks:
            stack.enter_context(_closing(callback))

        # The loop is the caller's. What follows it closes files, which can take long.
        stack.callback(run.clock.finish)
        yield TrainingRun(
            **vars(run),
            state=state,
            start_step=start_step,
            compiled_step=compiled_step,
            checkpointer=checkpointer,
            callbacks=callbacks,
        )


def _start_from(run: PreparedRun, state: TrainState, source: Workdir, step: int) -> TrainState:
    run.say(f"starting with the parameters of step {step:,} in {source.path}")
    return start_from(source, step, state)


def _describe(run: PreparedRun, state: TrainState) -> str:
    excluded = run.config.optimizer.weight_decay_exclude
    text = tabulate_params(state, show_weight_decay=True, weight_decay_exclude=excluded)
    if run.bubble:
        text += f"\npipeline stages are idle for {run.bubble:.0%} of the time of the blocks"
    return text


def _warn(text: str) -> None:
    """Shows what is the matter with this process, which need not be the first."""
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{place}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _closing(thing: Callback | Loggers) -> Iterator[None]:
    """Closes a callback or logger at the end; an exception raised in the block takes precedence."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


def _is_done(run: TrainingRun, step: int) -> bool:
    """Whether a run has come to its end; says from where it would resume if not.

    Raises:
        ValueError: If its last checkpoint is not confirmed.
    """
    num_steps, confirmed = run.config.trainer.num_steps, run.checkpointer.confirmed_step()
    is_confirmed = confirmed == step or not run.config.trainer.confirm_steps
    good = "none is yet" if confirmed is None else f"the last one is that of step {confirmed:,}"
    if step < num_steps:
        where = "there" if is_confirmed else f"the last confirmed checkpoint ({good})"
        run.say(
            f"stopped after step {step:,}, which is saved in {run.workdir.path}: the same command"
            f" resumes from {where}"
        )
        return False
    if not is_confirmed:
        raise ValueError(
            f"{step:,} steps are done, but the last ones were not sound, and their checkpoint is"
            f" not confirmed ({good}): lower schedule.peak_lr or optimizer.grad_clip_norm, or name"
            " the checkpoint itself to use it as it is"
        )
    return True
