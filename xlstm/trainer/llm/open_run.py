"""Opens a run: puts data, model, optimizer, mesh, callbacks and loggers together."""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.dataset.batch import Batch, rows_before
from xlstm.dataset.store_guard import StoreGuard
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.trainer.base.clock import watchdog
from xlstm.trainer.base.multihost import sync_processes
from xlstm.trainer.base.param_utils import tabulate_params
from xlstm.trainer.base.signals import on_stop_signal
from xlstm.trainer.base.throughput import measure_matmul_rate
from xlstm.trainer.base.trainer import Callback, fit, to_scalars
from xlstm.trainer.callbacks.bad_steps import BadStepsCallback
from xlstm.trainer.callbacks.checkpoint import CheckpointCallback
from xlstm.trainer.callbacks.evaluate import EvaluateCallback
from xlstm.trainer.callbacks.metrics import MetricsCallback
from xlstm.trainer.callbacks.profiling import ProfileCallback
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.read_params import read_run_info
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import batch_share, dump_batch, global_batches
from xlstm.trainer.llm.evaluation import DivergedError, create_evaluation
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.gate_statistics import gate_row
from xlstm.trainer.llm.language_model import create_language_model_run, start_from
from xlstm.trainer.llm.prepare_run import PreparedRun, prepare_run
from xlstm.trainer.llm.run_tokenizer import write_tokenizer
from xlstm.trainer.llm.workdir import (
    Workdir,
    own_workdir,
    plain_config,
    run_info,
    write_config,
)
from xlstm.trainer.logger.base_logger import Loggers
from xlstm.trainer.logger.jsonl import JsonLinesLogger
from xlstm.trainer.logger.loss_plot import LossPlotLogger
from xlstm.trainer.logger.tensorboard import TensorBoardLogger
from xlstm.trainer.logger.terminal import TerminalLogger
from xlstm.trainer.logger.wandb_logger import WandbLogger


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that is ready for its next step.

    Attributes:
        state: The state after `start_step` steps; `fit` consumes it.
        start_step: Steps done before.
        train_step: The training step, of state and batch.
        batches_from: Makes the batches that follow so many steps.
        checkpointer: What writes the checkpoints.
        fit: Trains a state from one step to another, with everything beside the steps, and with
            further callbacks.
        say: Shows a text to the user.
        mesh: The mesh.
        tokenizer: That of the data.
    """

    state: TrainState
    start_step: int
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    batches_from: Callable[[int], Iterator[Batch]]
    checkpointer: Checkpointer
    fit: Callable[..., TrainState]
    say: Callable[[str], None]
    mesh: Mesh
    tokenizer: Tokenizer


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    workdir_path: str,
    *,
    allow_config_change: bool = False,
    verify_data: bool = False,
) -> Iterator[OpenRun]:
    """Opens a run's folder, and brings everything to where the run was.

    Inside, the folder is this process's alone, and SIGTERM and SIGINT are wishes (`Stop`). At the
    end everything is written.

    Args:
        config: What to do; a run that goes on keeps the defaults that it began with.
        workdir_path: The run's folder; it is made if it is not there.
        allow_config_change: Whether to go on with a run that began with another configuration.
        verify_data: Whether to verify token stores now that are large, or were verified before.

    Yields:
        The run.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data or the folder.
        OSError: If something cannot be read or written.
    """
    run = prepare_run(config, workdir_path, allow_config_change)
    config, tokenizer = run.config, run.data.tokenizer
    guard = StoreGuard(run.stores, run.say)
    guard.verify_first(verify_data)
    sync_processes("stores")
    state, specs, train_step = create_language_model_run(config, run.mesh)
    if run.source:
        begin = functools.partial(_start_from, run, state)
        state = read_checkpoint(config.trainer.init_from, begin, run.say)
    run.say(_describe(run, state))
    with contextlib.ExitStack() as stack:
        stack.enter_context(own_workdir(run.workdir))
        stack.enter_context(watchdog(run.clock, config.trainer.stall_seconds, _warn))
        stack.enter_context(on_stop_signal(run.stop))
        stack.enter_context(guard)
        checkpointer = stack.enter_context(_open_checkpointer(run))
        state, start_step = _resume(run, checkpointer, state)
        if jax.process_index() == 0:
            write_config(run.workdir, config, run.data.checksums)
            write_tokenizer(run.workdir, run.tokenizer, run.source and run.source[0])
        loggers = _create_loggers(run, start_step)
        stack.enter_context(_closing(loggers))
        callbacks = _create_callbacks(run, state, specs, loggers, checkpointer)
        for callback in callbacks:
            stack.enter_context(_closing(callback))
        batches_from = functools.partial(_batches_from, run)

        def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            return train_step(state, batch, run.requests.current())

        def fit_run(
            state: TrainState, start_step: int, num_steps: int, *more_callbacks: Callback
        ) -> TrainState:
            return fit(
                state,
                batches_from,
                step,
                start_step=start_step,
                num_steps=num_steps,
                callbacks=[*callbacks, *more_callbacks],
                clock=run.clock,
                to_scalars=_to_row,
            )

        yield OpenRun(
            state=state,
            start_step=start_step,
            train_step=step,
            batches_from=batches_from,
            checkpointer=checkpointer,
            fit=fit_run,
            say=run.say,
            mesh=run.mesh,
            tokenizer=tokenizer,
        )


def _start_from(run: PreparedRun, state: TrainState, source: Workdir, step: int) -> TrainState:
    run.say(f"beginning with the parameters of step {step:,} in {source.path}")
    return start_from(source, step, state)


def _warn(text: str) -> None:
    """Shows what is the matter with this process, which need not be the first."""
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"{place}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _closing(thing: Callback | Loggers) -> Iterator[None]:
    """Closes at the end; after an error, that one is told and not another from closing."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            thing.close()
        raise
    thing.close()


def _describe(run: PreparedRun, state: TrainState) -> str:
    excluded = run.config.optimizer.weight_decay_exclude
    text = tabulate_params(state, show_weight_decay=True, weight_decay_exclude=excluded)
    if run.bubble:
        text += f"\npipeline stages are idle for {run.bubble:.0%} of the time of the blocks"
    return text


def _open_checkpointer(run: PreparedRun) -> Checkpointer:
    trainer = run.config.trainer
    return Checkpointer(
        run.workdir.checkpoints,
        max_to_keep=trainer.max_checkpoints,
        keep_period=trainer.keep_checkpoint_interval,
        keep_best=trainer.keep_best_checkpoint,
        only_confirmed=trainer.confirm_steps > 0,
        run_info=run_info(
            run.config,
            run.data.checksums,
            run.tokenizer,
            run.code,
            run.mesh.shape,
        ),
        report=run.say,
    )


def _resume(
    run: PreparedRun, checkpointer: Checkpointer, state: TrainState
) -> tuple[TrainState, int]:
    """Goes on from the last confirmed checkpoint, if there is one; returns state and step."""
    with run.clock.phase("checkpoint"):
        step = checkpointer.discard_unusable() or 0
        if step:
            state = checkpointer.restore(state)
            run.soundness.from_dict(_saved_soundness(run, checkpointer, step))
    if step:
        _say_going_on(run, step)
    return state, step


def _say_going_on(run: PreparedRun, step: int) -> None:
    run.say(f"going on from step {step:,}, the last checkpoint in {run.workdir.path}")
    before = read_run_info(run.workdir.checkpoints, step)["code"]
    changes = [
        f"{name} was {before.get(name)}, is {version}"
        for name, version in run.code.items()
        if before.get(name) != version
    ]
    if changes:
        run.say(f"other code wrote it: {'; '.join(changes)}")


def _batches_from(run: PreparedRun, step: int) -> Iterator[Batch]:
    share = batch_share(run.mesh)
    batches = run.data.train_batches(start_step=step, **share)
    return global_batches(batches, run.mesh)


def _to_row(metrics: Metrics) -> dict[str, float]:
    """See `to_scalars`; the statistics of the gates are numbers of every block."""
    numbers = {name: value for name, value in metrics.items() if name != "gates"}
    return to_scalars(numbers) | gate_row(metrics.get("gates", {}))


def evaluated_params(state: TrainState) -> PyTree:
    """The parameters to judge a model by: their moving average, if there is one."""
    return state.params if state.params_ema is None else state.params_ema


def _create_callbacks(
    run: PreparedRun,
    state: TrainState,
    specs: PyTree,
    loggers: Loggers,
    checkpointer: Checkpointer,
) -> list[Callback]:
    config, trainer = run.config, run.config.trainer
    context_length = config.data.context_length
    metrics = MetricsCallback(
        loggers,
        run.clock,
        interval=config.logger.interval,
        tokens_before=lambda step: rows_before(config.data, step) * context_length,
        flops_per_token=count_flops_per_token(config.language_model, context_length),
        matmul_rate=measure_matmul_rate(config.model.compute_dtype, config.model.precision),
        constants={"bubble_fraction": run.bubble} if run.bubble else {},
    )
    bad_steps = BadStepsCallback(
        trainer.nan_policy,
        trainer.max_skipped_steps,
        run.soundness,
        confirmed_step=functools.partial(_confirmed_step, checkpointer),
        dump_batch=functools.partial(dump_batch, run.data, run.workdir.bad_batches),
        roll_back=functools.partial(_roll_back, run, loggers, checkpointer),
        report=run.say,
    )
    # A checkpoint comes last: what a step has to say is written before the step counts as done.
    checkpoint = CheckpointCallback(
        checkpointer,
        run.clock,
        run.requests,
        run.soundness,
        interval=trainer.checkpoint_interval,
        minutes=trainer.checkpoint_minutes,
        best_interval=trainer.eval_interval if trainer.keep_best_checkpoint else 0,
    )
    evaluate = create_evaluation(
        run.mesh,
        specs.params,
        state.apply_fn,
        run.validation_sets,
        trainer.eval_batches,
        on_batch=run.clock.tick,
    )

    def evaluate_state(state: TrainState) -> dict[str, float]:
        try:
            return evaluate(evaluated_params(state))
        except DivergedError as error:
            raise ValueError(f"{error}. {bad_steps.advice()}") from error

    evaluation = EvaluateCallback(
        evaluate_state,
        loggers,
        run.clock,
        trainer.eval_interval,
        checkpoint.set_val_loss,
    )
    profile = ProfileCallback(run.workdir.profile, config.logger.profile_steps)
    return [metrics, bad_steps, *([evaluation] if run.validation_sets else []), checkpoint, profile]


def _confirmed_step(checkpointer: Checkpointer) -> int | None:
    """The last confirmed checkpoint, once what is being written is whole."""
    checkpointer.wait_until_finished()
    return checkpointer.confirmed_step()


def _saved_soundness(
    run: PreparedRun, checkpointer: Checkpointer, step: int
) -> dict[str, Any] | None:
    """What a checkpoint knows of the steps before it; other text has other losses."""
    is_same_text = read_run_info(run.workdir.checkpoints, step)["corpora"] == run.data.checksums
    return checkpointer.soundness(step) if is_same_text else None


def _roll_back(
    run: PreparedRun, loggers: Loggers, checkpointer: Checkpointer, step: int, state: TrainState
) -> TrainState:
    """The last confirmed checkpoint's state, as if the steps since had changed nothing."""
    with run.clock.phase("checkpoint"):
        saved_step = checkpointer.discard_unusable()
        if saved_step is None:
            raise ValueError(
                f"step {step} cannot be rolled back, since there is no checkpoint yet: begin anew"
                " with a lower schedule.peak_lr"
            )
        state = checkpointer.restore(state)
        run.soundness.from_dict(_saved_soundness(run, checkpointer, saved_step))
    loggers.log(step, {"rolled_back_to": saved_step})
    lost = step - saved_step
    return state.replace(step=state.step + lost, skipped_steps=state.skipped_steps + lost)


def _create_loggers(run: PreparedRun, start_step: int) -> Loggers:
    """Only the first process writes and shows anything."""
    if jax.process_index() != 0:
        return Loggers([])
    workdir, config = run.workdir, run.config
    first_step = start_step + 1 if start_step else 0  # A new run begins with an evaluation.
    loggers = [
        JsonLinesLogger(workdir.metrics, first_step),
        LossPlotLogger(workdir.metrics, workdir.loss_plot),
        TerminalLogger(run.console, start_step, config.trainer.num_steps),
    ]
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(workdir.tensorboard, first_step))
    if config.logger.wandb:
        project, name = config.logger.wandb_project, os.path.basename(workdir.path)
        plain = plain_config(config)
        loggers.append(WandbLogger(workdir.path, project, name, plain, workdir.metrics))
    return Loggers(loggers)
