"""Creates what a run of a language model computes with: state and training step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xlstm.common_types import Metrics, PRNGKeyArray, PyTree, TrainState
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.train_state import create_train_state
from xlstm.trainer.base.train_step import create_train_step
from xlstm.trainer.base.update import update_state
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.loss import create_loss_fn
from xlstm.trainer.optimizer.optimizers import create_optimizer
from xlstm.trainer.optimizer.schedule import create_schedule


def create_language_model_run(
    config: RunConfig, mesh: Mesh, abstract: bool = False
) -> tuple[TrainState, PyTree, Callable[..., tuple[TrainState, Metrics]]]:
    """Creates what a run computes with.

    Args:
        config: The run's configuration.
        mesh: The mesh.
        abstract: Whether shapes and places of the state are enough, see `create_train_state`.

    Returns:
        The initial train state, its partition specs and the training step.
    """
    model, optimizer = xLSTMLMModel(config.language_model), config.optimizer

    def init_params(rng: PRNGKeyArray) -> PyTree:
        return shard_parameters(
            model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"],
            mesh.shape["fsdp"],
            min_weight_size=config.mesh.fsdp_min_weight_size,
        )

    state, specs = create_train_state(
        init_params=init_params,
        apply_fn=model.apply,
        optimizer=create_optimizer(optimizer),
        rng=jax.random.PRNGKey(config.trainer.seed),
        mesh=mesh,
        abstract=abstract,
        with_ema=optimizer.ema_decay > 0,
    )
    train_step = create_train_step(
        mesh,
        specs,
        functools.partial(
            create_loss_fn,
            gate_pattern=config.model.pattern if config.logger.gate_statistics else None,
        ),
        count_targets=lambda batch: jnp.sum(batch.targets_mask, dtype=jnp.float32),
        update=functools.partial(
            update_state,
            schedule=create_schedule(config.schedule),
            grad_clip_norm=optimizer.grad_clip_norm,
            max_grad_norm_ratio=optimizer.max_grad_norm_ratio,
            ema_decay=optimizer.ema_decay,
        ),
        num_minibatches=config.trainer.num_minibatches,
        norms_per_param=config.logger.param_norms,
    )
    return state, specs, train_step
