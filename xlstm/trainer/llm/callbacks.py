"""The callbacks of a run, created from its configuration."""

import functools

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.dataset.batch import rows_before
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.trainer.base.throughput import measure_matmul_rate
from xlstm.trainer.base.trainer import Callback, to_scalars
from xlstm.trainer.callbacks.bad_steps import BadStepsCallback
from xlstm.trainer.callbacks.checkpoint import CheckpointCallback
from xlstm.trainer.callbacks.evaluate import EvaluateCallback
from xlstm.trainer.callbacks.metrics import MetricsCallback
from xlstm.trainer.callbacks.profiling import ProfileCallback
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.data import dump_batch
from xlstm.trainer.llm.evaluation import DivergedError, create_evaluation
from xlstm.trainer.llm.gate_statistics import gate_scalars
from xlstm.trainer.llm.prepare_run import PreparedRun
from xlstm.trainer.llm.resume import roll_back
from xlstm.trainer.logger.base_logger import Logger


def create_callbacks(
    run: PreparedRun,
    state: TrainState,
    specs: PyTree,
    logger: Logger,
    checkpointer: Checkpointer,
) -> list[Callback]:
    """Creates the callbacks of a run, in the order in which they are called.

    Args:
        run: The run.
        state: The train state; only `apply_fn` is used.
        specs: Partition specs of the state.
        logger: Logger of the metrics.
        checkpointer: The run's checkpoints.

    Returns:
        The callbacks.
    """
    trainer = run.config.trainer
    bad_steps = BadStepsCallback(
        trainer.nan_policy,
        trainer.max_skipped_steps,
        run.soundness,
        confirmed_step=functools.partial(_confirmed_step, checkpointer),
        dump_batch=functools.partial(dump_batch, run.data, run.workdir.bad_batches),
        roll_back=functools.partial(roll_back, run, logger, checkpointer),
        report=run.say,
    )
    checkpoint = CheckpointCallback(
        checkpointer,
        run.clock,
        run.requests,
        run.soundness,
        interval=trainer.checkpoint_interval,
        minutes=trainer.checkpoint_minutes,
        best_interval=trainer.eval_interval if trainer.keep_best_checkpoint else 0,
    )
    evaluate_params = create_evaluation(
        run.mesh,
        specs.params,
        state.apply_fn,
        run.validation_sets,
        trainer.eval_batches,
        on_batch=run.clock.tick,
        carried_state=CarriedState.of_run(run.config),
    )

    def evaluate_state(state: TrainState) -> dict[str, float]:
        try:
            return evaluate_params(evaluated_params(state))
        except DivergedError as error:
            raise ValueError(f"{error}. {bad_steps.advice()}") from error

    evaluation = EvaluateCallback(
        evaluate_state, logger, run.clock, trainer.eval_interval, checkpoint.set_val_loss
    )
    profile = ProfileCallback(run.workdir.profile, run.config.logger.profile_steps)
    # Checkpoints come after everything that logs, so that a saved step has all its metrics.
    evaluations = [evaluation] if run.validation_sets else []
    return [_metrics_callback(run, logger), bad_steps, *evaluations, checkpoint, profile]


def _metrics_callback(run: PreparedRun, logger: Logger) -> MetricsCallback:
    config = run.config
    context_length = config.data.context_length
    return MetricsCallback(
        logger,
        run.clock,
        interval=config.logger.interval,
        tokens_before=lambda step: rows_before(config.data, step) * context_length,
        flops_per_token=count_flops_per_token(config.language_model, context_length),
        matmul_rate=measure_matmul_rate(config.model.compute_dtype, config.model.precision),
        constants={"bubble_fraction": run.bubble_fraction} if run.bubble_fraction else {},
    )


def _confirmed_step(checkpointer: Checkpointer) -> int | None:
    """Waits for pending writes, then returns the step of the last confirmed checkpoint."""
    checkpointer.wait_until_finished()
    return checkpointer.confirmed_step()


def evaluated_params(state: TrainState) -> PyTree:
    """Returns the parameters to evaluate: their moving average, if there is one."""
    return state.params if state.params_ema is None else state.params_ema


def metrics_to_scalars(metrics: Metrics) -> dict[str, float]:
    """Converts a step's metrics to numbers; see `to_scalars`, and `gate_scalars` for gates."""
    numbers = {name: value for name, value in metrics.items() if name != "gates"}
    return to_scalars(numbers) | gate_scalars(metrics.get("gates", {}))
