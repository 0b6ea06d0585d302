"""The model of a run: its parameters, its training step, and parameters from another run."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree, TrainState
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.param_utils import count_nonfinite, nonfinite_text
from xlstm.trainer.base.train_state import abstract_arrays, create_train_state
from xlstm.trainer.base.train_step import create_train_step
from xlstm.trainer.base.update import update_state
from xlstm.trainer.checkpoints.read_params import read_params, read_run_info
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.loss import loss_metrics
from xlstm.trainer.llm.run_tokenizer import check_tokenizer
from xlstm.trainer.llm.workdir import Workdir
from xlstm.trainer.optimizer.optimizers import create_optimizer
from xlstm.trainer.optimizer.schedule import create_schedule


def init_params(config: RunConfig, mesh: Mesh, rng: PRNGKeyArray) -> PyTree:
    """Initializes the parameters of a run's model; their values do not depend on the mesh.

    Args:
        config: The run's configuration.
        mesh: The mesh, which decides the partition names.
        rng: Random key.

    Returns:
        Boxed parameters with global shapes.
    """
    model = xLSTMLMModel(config.language_model)
    return shard_parameters(
        model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"],
        mesh.shape["fsdp"],
        min_weight_size=config.mesh.fsdp_min_weight_size,
    )


def abstract_params(config: RunConfig, mesh: Mesh) -> tuple[PyTree, PyTree]:
    """Returns the shapes and shardings of a model's parameters, without computing them.

    Args:
        config: The run's configuration.
        mesh: The mesh.

    Returns:
        Boxed `jax.ShapeDtypeStruct`s with shardings, and the tree of partition specs.
    """
    shapes = jax.eval_shape(functools.partial(init_params, config, mesh), jax.random.PRNGKey(0))
    specs = nn.get_partition_spec(shapes)
    return abstract_arrays(shapes, specs, mesh), specs


def create_training(
    config: RunConfig, mesh: Mesh, abstract: bool = False
) -> tuple[TrainState, PyTree, Callable[..., tuple[TrainState, Metrics]]]:
    """Creates the train state and the training step of a run.

    Args:
        config: The run's configuration.
        mesh: The mesh.
        abstract: Whether to return only shapes and shardings of the state, see
            `create_train_state`.

    Returns:
        The initial train state, its partition specs and the training step, see
        `create_train_step`.
    """
    optimizer, schedule = config.optimizer, config.with_decay_steps().schedule
    carried = CarriedState.of_run(config)
    state, specs = create_train_state(
        init_params=functools.partial(init_params, config, mesh),
        apply_fn=xLSTMLMModel(config.language_model).apply,
        optimizer=create_optimizer(optimizer),
        rng=jax.random.PRNGKey(config.trainer.seed),
        mesh=mesh,
        abstract=abstract,
        with_ema=optimizer.ema_decay > 0,
        **({"carried_state": carried.zeros, "carried_specs": carried.specs} if carried else {}),
    )
    train_step = create_train_step(
        mesh,
        specs,
        functools.partial(
            loss_metrics,
            gate_pattern=config.model.pattern if config.logger.gate_statistics else None,
        ),
        count_targets=lambda batch: jnp.sum(batch.targets_mask, dtype=jnp.float32),
        update=functools.partial(
            update_state,
            schedule=create_schedule(schedule),
            grad_clip_norm=optimizer.grad_clip_norm,
            max_grad_norm_ratio=optimizer.max_grad_norm_ratio,
            ema_decay=optimizer.ema_decay,
        ),
        num_minibatches=config.trainer.num_minibatches,
        norms_per_param=config.logger.param_norms,
    )
    return state, specs, train_step


def check_source(workdir: Workdir, step: int, tokenizer: Tokenizer) -> None:
    """Checks that the data has the tokenizer of a checkpoint.

    Args:
        workdir: The folder of the checkpoint's run.
        step: The checkpoint's step.
        tokenizer: The tokenizer of the data.

    Raises:
        ValueError: If the checkpoint's tokenizer is known and differs.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If the checkpoint cannot be read.
    """
    check_tokenizer(workdir, read_run_info(workdir.checkpoints, step), tokenizer)


def init_from_checkpoint(
    workdir: Workdir,
    step: int,
    state: TrainState,
    report: Callable[[str], None] = lambda text: None,
) -> TrainState:
    """Replaces the parameters of a new train state with those of a checkpoint.

    Args:
        workdir: The folder of the checkpoint's run.
        step: The checkpoint's step.
        state: The state, before its first step. It is consumed before the checkpoint is read, so
            memory never holds two sets of parameters. After a CheckpointGone, pass it again with
            another checkpoint.
        report: Called with a line that names the checkpoint.

    Returns:
        The state with the checkpoint's parameters, or with their moving average if there is one.
        The state's own moving average starts from the same values. The optimizer's state is kept.

    Raises:
        ValueError: If a parameter is not finite.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If the checkpoint is damaged, or belongs to another model.
    """
    report(f"starting with the parameters of step {step:,} in {workdir.path}")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    _delete(state.params)
    _delete(state.params_ema)
    params = read_params(workdir.checkpoints, step, like)
    nonfinite = count_nonfinite(params)
    if nonfinite:
        raise ValueError(
            f"no run can start from the checkpoint of step {step} in {workdir.checkpoints}:"
            f" {nonfinite_text(nonfinite)}"
        )
    # A copy, since a training step donates both buffers.
    average = None if state.params_ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, params_ema=average)


def _delete(tree: PyTree) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
