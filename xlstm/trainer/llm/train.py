"""Trains a language model: puts data, model, optimizer, mesh, callbacks and loggers together."""

import contextlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree, TrainState
from xlstm.dataset.batch import Batch
from xlstm.dataset.pipeline import open_stores, train_batches, validation_batches
from xlstm.dataset.token_store import TokenStore
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.distributed.pipeline_parallel import bubble_fraction
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.callback import Callback
from xlstm.trainer.base.checkpointing import Checkpointer
from xlstm.trainer.base.param_utils import get_num_params, tabulate_params
from xlstm.trainer.base.throughput import Throughput, measure_matmul_rate
from xlstm.trainer.base.train_state import create_train_state
from xlstm.trainer.base.train_step import create_eval_step, create_train_step
from xlstm.trainer.base.trainer import fit
from xlstm.trainer.callbacks.checkpoint import CheckpointCallback
from xlstm.trainer.callbacks.evaluate import EvaluateCallback
from xlstm.trainer.callbacks.metrics import MetricsCallback
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import (
    batch_share,
    check_vocabulary,
    corpus_checksums,
    create_run_mesh,
    global_batches,
)
from xlstm.trainer.llm.loss import create_loss_fn, next_token_nll
from xlstm.trainer.llm.sample import sample_text, without_stages
from xlstm.trainer.llm.workdir import Workdir, check_workdir, own_workdir, write_config
from xlstm.trainer.logger.base_logger import Loggers
from xlstm.trainer.logger.jsonl import JsonLinesLogger
from xlstm.trainer.logger.loss_plot import LossPlotLogger
from xlstm.trainer.logger.tensorboard import TensorBoardLogger
from xlstm.trainer.logger.terminal import TerminalLogger
from xlstm.trainer.optimizer.optimizers import create_optimizer
from xlstm.trainer.optimizer.schedule import create_schedule


def create_language_model_run(
    config: RunConfig, mesh: Mesh, abstract: bool = False
) -> tuple[TrainState, PyTree, Callable[[TrainState, Batch], tuple[TrainState, Metrics]]]:
    """Creates what a run computes with.

    Args:
        config: The run's configuration.
        mesh: The mesh.
        abstract: Whether shapes and places of the state are enough, see `create_train_state`.

    Returns:
        The initial train state, its partition specs and the training step.
    """
    model = xLSTMLMModel(config.language_model)
    schedule = create_schedule(config.schedule)

    def init_params(rng: PRNGKeyArray) -> PyTree:
        return shard_parameters(
            model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"],
            mesh.shape["fsdp"],
            min_weight_size=config.mesh.fsdp_min_weight_size,
        )

    state, specs = create_train_state(
        init_params=init_params,
        apply_fn=model.apply,
        optimizer=create_optimizer(config.optimizer, schedule),
        rng=jax.random.PRNGKey(config.trainer.seed),
        mesh=mesh,
        abstract=abstract,
    )
    train_step = create_train_step(
        mesh,
        specs,
        create_loss_fn,
        count_targets=lambda batch: jnp.sum(batch.targets_mask, dtype=jnp.float32),
        schedule=schedule,
        num_minibatches=config.trainer.num_minibatches,
    )
    return state, specs, train_step


def train_language_model(
    config: RunConfig, workdir_path: str, *, allow_config_change: bool = False
) -> None:
    """Trains from scratch, or goes on from the last checkpoint in the run's folder.

    Args:
        config: What to do.
        workdir_path: The run's folder; it is made if it is not there.
        allow_config_change: Whether to go on with a run that began with another configuration.

    Raises:
        ValueError: If the configuration does not fit itself, the devices, the data or the folder.
        OSError: If something cannot be read or written.
    """
    mesh = create_run_mesh(config)
    share = batch_share(mesh)
    workdir = Workdir(workdir_path)
    check_workdir(workdir, config, allow_config_change=allow_config_change)
    stores = open_stores(config.data, workdir.stdlib_store)
    check_vocabulary(config, stores)
    tokenizer = stores[0].load_tokenizer()
    corpora = corpus_checksums(stores)
    check_workdir(workdir, config, corpora, allow_config_change=allow_config_change)

    state, specs, train_step = create_language_model_run(config, mesh)
    is_first_process = jax.process_index() == 0
    console = Console(quiet=not is_first_process, highlight=False)
    excluded = config.optimizer.weight_decay_exclude
    table = tabulate_params(state, show_weight_decay=True, weight_decay_exclude=excluded)
    console.print(table, soft_wrap=True)
    stages = mesh.shape["pp"]
    bubble = bubble_fraction(stages, config.mesh.count_microbatches(stages))
    if bubble:
        console.print(f"pipeline stages are idle for {bubble:.0%} of the time of the blocks")
    with contextlib.ExitStack() as stack:
        if is_first_process:
            stack.enter_context(own_workdir(workdir))
        checkpointer = stack.enter_context(
            Checkpointer(workdir.checkpoints, config.trainer.max_checkpoints)
        )
        start_step = checkpointer.latest_step() or 0
        if start_step:
            state = checkpointer.restore(state)
            console.print(
                f"going on from step {start_step:,}, the last checkpoint in {workdir.path}",
                soft_wrap=True,
            )
        if is_first_process:
            write_config(workdir, config, corpora)
        batches = train_batches(config.data, stores, start_step=start_step, **share)
        loggers = _create_loggers(config, workdir, console, start_step)
        stack.callback(loggers.close)
        evaluate = _create_evaluation(config, mesh, specs, stores, share, state.apply_fn)
        state = fit(
            state,
            global_batches(batches, mesh),
            train_step,
            start_step=start_step,
            num_steps=max(config.trainer.num_steps, start_step),
            callbacks=_create_callbacks(config, bubble, state, loggers, evaluate, checkpointer),
        )
    if config.logger.sample_tokens:
        console.rule("a sample")
        console.print(
            sample_text(config, without_stages(state.params, mesh), tokenizer),
            markup=False,
            soft_wrap=True,
        )
        console.rule()
    console.print(
        f"{int(state.step):,} steps done; everything lies in {workdir.path}", soft_wrap=True
    )


def _create_callbacks(
    config: RunConfig,
    bubble: float,
    state: TrainState,
    loggers: Loggers,
    evaluate: Callable[[TrainState], float],
    checkpointer: Checkpointer,
) -> list[Callback]:
    throughput = Throughput()
    metrics = MetricsCallback(
        loggers,
        throughput,
        interval=config.logger.interval,
        tokens_per_step=config.data.batch_size * config.data.context_length,
        flops_per_token=6 * get_num_params(state.params),
        matmul_rate=measure_matmul_rate(config.model.compute_dtype),
        constants={"bubble_fraction": bubble} if bubble else {},
    )
    evaluation = EvaluateCallback(evaluate, loggers, throughput, config.trainer.eval_interval)
    # A checkpoint comes last: what a step has to say is written before the step counts as done.
    checkpoint = CheckpointCallback(checkpointer, throughput, config.trainer.checkpoint_interval)
    return [metrics, *([evaluation] if config.data.validation_fraction > 0 else []), checkpoint]


def _create_loggers(
    config: RunConfig, workdir: Workdir, console: Console, start_step: int
) -> Loggers:
    """Only the first process writes and shows anything."""
    if jax.process_index() != 0:
        return Loggers([])
    first_step = start_step + 1 if start_step else 0  # A new run begins with an evaluation.
    loggers = [
        JsonLinesLogger(workdir.metrics, first_step),
        LossPlotLogger(workdir.metrics, workdir.loss_plot),
        TerminalLogger(console, start_step, config.trainer.num_steps),
    ]
    if config.logger.tensorboard:
        loggers.append(TensorBoardLogger(workdir.tensorboard, first_step))
    return Loggers(loggers)


def _create_evaluation(
    config: RunConfig,
    mesh: Mesh,
    specs: PyTree,
    stores: Sequence[TokenStore],
    share: dict[str, int],
    apply_fn: Callable,
) -> Callable[[TrainState], float]:
    eval_step = create_eval_step(
        mesh, specs.params, lambda params, batch: next_token_nll(params, apply_fn, batch)
    )

    def evaluate(state: TrainState) -> float:
        """The validation loss in nats a token."""
        batches = validation_batches(
            config.data, stores, max_batches=config.trainer.eval_batches, **share
        )
        sums = [eval_step(state.params, batch) for batch in global_batches(batches, mesh)]
        nll, count = (float(sum(values)) for values in zip(*jax.device_get(sums), strict=True))
        return nll / count

    return evaluate
