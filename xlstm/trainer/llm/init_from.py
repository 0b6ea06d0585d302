"""Begins a run with the parameters of another one."""

import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree, TrainState
from xlstm.trainer.base.checkpointing import read_run_info
from xlstm.trainer.base.read_params import read_params
from xlstm.trainer.llm.run_tokenizer import check_same_tokenizer
from xlstm.trainer.llm.workdir import find_checkpoint


def start_from(path: str, state: TrainState, tokenizer: str) -> TrainState:
    """Replaces the parameters of a state that has not taken a step.

    Args:
        path: The folder of a run, for its last checkpoint, or of one of its checkpoints; of a
            moving average of the parameters, if there is one, it is that.
        state: The state. It is consumed, so that two sets of parameters never need room at once.
        tokenizer: The fingerprint of the data's tokenizer.

    Returns:
        The state with those parameters, which its own moving average begins from, too. The
        optimizer's state is as it was.

    Raises:
        ValueError: If there is no checkpoint, or the model's tokenizer is known and another one.
        OSError: If it is damaged, or of another model.
    """
    workdir, step = find_checkpoint(path)
    check_same_tokenizer(read_run_info(workdir.checkpoints, step)["tokenizer"], tokenizer)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    _delete(state.params)
    _delete(state.params_ema)
    params = read_params(workdir.checkpoints, step, like)
    # A true copy: a training step gives both buffers away.
    average = None if state.params_ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, params_ema=average)


def _delete(tree: PyTree) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
