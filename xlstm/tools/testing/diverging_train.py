"""The training tool with gradients that are not finite after steps 12 and 16, for tests."""

from typing import Any

import jax
import jax.numpy as jnp

from xlstm.common_types import Metrics, PyTree, TrainState
from xlstm.tools import train
from xlstm.tools.command_line import run
from xlstm.tools.config import define_config_flags
from xlstm.trainer.base.update import update_state
from xlstm.trainer.llm import language_model


def _update(
    state: TrainState,
    grads: PyTree,
    grad_norm: jax.Array,
    loss: jax.Array,
    *args: Any,
    **options: Any,
) -> tuple[TrainState, Metrics]:
    is_bad = (state.step == 12) | (state.step == 16)
    grad_norm = jnp.where(is_bad, jnp.nan, grad_norm)
    state, metrics = update_state(state, grads, grad_norm, loss, *args, **options)
    return state, metrics | {"grad_norm": grad_norm}


if __name__ == "__main__":
    language_model.update_state = _update
    run(train.main, define_config_flags)
