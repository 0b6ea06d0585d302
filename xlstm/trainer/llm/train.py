"""Trains a language model: data, model, checkpoints, callbacks, and the loop over the steps.

First read `open_training`, which sets up a run, then `train_language_model`, which runs it.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import jax

from xlstm.common_types import Metrics, TrainState
from xlstm.dataset.batch import Batch
from xlstm.dataset.store_guard import StoreGuard
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import mlstm_line
from xlstm.trainer.base.clock import report_waits, watchdog
from xlstm.trainer.base.multihost import sync_processes
from xlstm.trainer.base.param_utils import tabulate_params
from xlstm.trainer.base.signals import on_stop_signal
from xlstm.trainer.base.trainer import Callback, fit
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm.callbacks import create_callbacks, metrics_to_scalars
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import global_batches, process_shard
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.language_model import create_training, init_from_checkpoint
from xlstm.trainer.llm.loggers import create_loggers
from xlstm.trainer.llm.prepare_run import PreparedRun, prepare_run
from xlstm.trainer.llm.resume import check_end, open_checkpointer, resume
from xlstm.trainer.llm.workdir import lock_workdir
from xlstm.trainer.logger.base_logger import Loggers
from xlstm.trainer.logger.terminal import mesh_line, unused_accelerator_line


@dataclasses.dataclass(frozen=True)
class TrainingRun(PreparedRun):
    """A run that is ready for its next step.

    Attributes:
        state: Train state after `start_step` steps; training consumes it.
        start_step: Number of steps already done.
        compiled_step: Training step: a function of state, batch and the processes' requests.
        checkpointer: Writer of the checkpoints.
        callbacks: Callbacks of the loop, in the order in which they are called.
    """

    state: TrainState
    start_step: int
    compiled_step: Callable[..., tuple[TrainState, Metrics]]
    checkpointer: Checkpointer
    callbacks: Sequence[Callback]

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Takes a training step, which consumes the state."""
        return self.compiled_step(state, batch, self.requests.current())

    def batches_from(self, step: int) -> Iterator[Batch]:
        """Returns the global batches after the first `step` steps."""
        batches = self.data.train_batches(start_step=step, **process_shard(self.mesh))
        return global_batches(batches, self.mesh)


def train_language_model(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
    sample: Callable[[TrainingRun, TrainState], str] | None = None,
) -> bool:
    """Trains a new run, or resumes from the last confirmed checkpoint in the run's folder.

    SIGTERM, SIGINT and SIGHUP stop the run early, after it has written a checkpoint.

    Args:
        config: The run's configuration.
        workdir_path: The run's folder; it is created if it does not exist.
        allow_config_change: Whether the run may resume with another configuration.
        verify_data: Whether to verify, before the first step, also the token stores that are large
            or were verified before.
        sample: Generates a text with the trained model, to show at the end; None shows none.

    Returns:
        Whether all steps are done; if not, a signal has stopped the run.

    Raises:
        ValueError: If the configuration is invalid or does not fit the devices, the data or the
            folder; if training diverges, or if its last steps are not sound.
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
    if not check_end(run, run.checkpointer, int(state.step)):
        return False
    if sample:
        run.say(f"{' a sample ':─^80}")
        run.say(f"{sample(run, state)}\n{'':─^80}")
    run.say(f"{int(state.step):,} steps done; everything is in {workdir_path}")
    return True


@contextlib.contextmanager
def open_training(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
) -> Iterator[TrainingRun]:
    """Sets up a new run, or restores one to its last confirmed checkpoint.

    Inside the block, this run owns the folder, and stop signals are requests. When the block ends,
    all files are complete. The arguments are those of `train_language_model`.

    Yields:
        The run.

    Raises:
        ValueError: If the configuration is invalid or does not fit the devices, the data or the
            folder.
        OSError: If something cannot be read or written.
    """
    with contextlib.ExitStack() as stack:
        # Data. All inputs are checked before anything but the built-in store is created.
        run = prepare_run(config, workdir_path, allow_config_change)
        for line in (
            mesh_line(run.mesh),
            unused_accelerator_line(run.mesh),
            mlstm_line(run.config.language_model, run.mesh.devices.flat[0]),
        ):
            if line:
                run.say(line)
        stack.enter_context(report_waits(run.clock, run.say))
        guard = StoreGuard(run.stores, run.say)
        guard.verify_first(verify_data)
        sync_processes("stores")

        # Model: new parameters, or those of another run.
        state, specs, compiled_step = create_training(run.config, run.mesh)
        if run.source:
            load = functools.partial(init_from_checkpoint, state=state, report=run.say)
            state = read_checkpoint(run.config.trainer.init_from, load, run.say)
        run.say(_describe(run, state))

        # Resume. From here on this run owns the folder and the files in it.
        stack.enter_context(lock_workdir(run.workdir))
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

        # The caller runs the loop. Closing the files can take long, so the clock reports it.
        stack.callback(run.clock.finish)
        yield TrainingRun(
            **vars(run),
            state=state,
            start_step=start_step,
            compiled_step=compiled_step,
            checkpointer=checkpointer,
            callbacks=callbacks,
        )


def _describe(run: PreparedRun, state: TrainState) -> str:
    """Returns the table of the parameters, and the idle time of the pipeline stages."""
    excluded = run.config.optimizer.weight_decay_exclude
    text = tabulate_params(state, show_weight_decay=True, weight_decay_exclude=excluded)
    if run.bubble_fraction:
        text += (
            f"\npipeline stages are idle for {run.bubble_fraction:.0%} of the time of the blocks"
        )
    return text


def _warn(text: str) -> None:
    """Prints a warning about this process; `say` would print it in process 0 only."""
    process = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{process}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _closing(resource: Callback | Loggers) -> Iterator[None]:
    """Closes a callback or logger at the end; an exception raised in the block takes precedence."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            resource.close()
        raise
    resource.close()
