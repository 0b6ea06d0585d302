"""Begins a run with the parameters of another one."""

import jax
import jax.numpy as jnp

from xlstm.common_types import PyTree, TrainState
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.trainer.base.checkpointing import read_run_info
from xlstm.trainer.base.nonfinite import count_nonfinite, nonfinite_text
from xlstm.trainer.base.read_params import read_params
from xlstm.trainer.llm.run_tokenizer import check_tokenizer
from xlstm.trainer.llm.workdir import Workdir


def check_source(workdir: Workdir, step: int, tokenizer: Tokenizer) -> None:
    """Checks that data is of the tokenizer that parameters were trained with.

    Args:
        workdir: The folder of the run that has the parameters.
        step: The step of its checkpoint.
        tokenizer: That of the data.

    Raises:
        ValueError: If the tokenizer of the parameters is known and another one.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If the checkpoint cannot be read.
    """
    check_tokenizer(workdir, read_run_info(workdir.checkpoints, step), tokenizer)


def start_from(workdir: Workdir, step: int, state: TrainState) -> TrainState:
    """Replaces the parameters of a state that has not taken a step.

    Args:
        workdir: The folder of the run that has the parameters.
        step: The step of its checkpoint.
        state: The state. It is consumed, so that two sets of parameters never need room at once;
            after a CheckpointGone it serves for another checkpoint.

    Returns:
        The state with those parameters, or their moving average if there is one; its own moving
        average begins from the same. The optimizer's state is as it was.

    Raises:
        ValueError: If a parameter is not finite.
        CheckpointGone: If the checkpoint has been removed meanwhile.
        OSError: If the checkpoint is damaged, or of another model.
    """
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
    )
    _delete(state.params)
    _delete(state.params_ema)
    params = read_params(workdir.checkpoints, step, like)
    nonfinite = count_nonfinite(params)
    if nonfinite:
        raise ValueError(
            f"no run can begin with the checkpoint of step {step} in {workdir.checkpoints}:"
            f" {nonfinite_text(nonfinite)}"
        )
    # A true copy: a training step gives both buffers away.
    average = None if state.params_ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, params_ema=average)


def _delete(tree: PyTree) -> None:
    for array in jax.tree.leaves(tree):
        array.delete()
