"""The training tool with a learning rate that ruins the parameters after a step, for the soak."""

import dataclasses
from typing import Any

from absl import flags
from jax.sharding import Mesh

from xlstm.common_types import TrainState
from xlstm.tools import train
from xlstm.tools.command_line import run
from xlstm.tools.config import define_config_flags
from xlstm.trainer.llm import train as llm_train
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.language_model import create_training
from xlstm.trainer.optimizer.schedule import ScheduleConfig

_AFTER = flags.DEFINE_integer("ruin_after", 0, "Number of steps with the configured learning rate.")
_LR = flags.DEFINE_float("ruinous_lr", 1e3, "Learning rate of all later steps.")


def _create_run(config: RunConfig, mesh: Mesh) -> tuple[Any, ...]:
    """Does what `create_training` does; the training step is one of two."""
    state, specs, good_step = create_training(config, mesh)
    schedule = ScheduleConfig(peak_lr=_LR.value, warmup_steps=0, decay="constant")
    ruinous = dataclasses.replace(config, schedule=schedule)
    abstract, _, bad_step = create_training(ruinous, mesh, abstract=True)

    def train_step(state: TrainState, *others: Any) -> tuple[Any, ...]:
        if int(state.step) < _AFTER.value:
            return good_step(state, *others)
        # Functions are part of a state's type, and each compiled step expects its own.
        own = {"apply_fn": state.apply_fn, "tx": state.tx}
        state = state.replace(apply_fn=abstract.apply_fn, tx=abstract.tx)
        state, metrics = bad_step(state, *others)
        return state.replace(**own), metrics

    return state, specs, train_step


if __name__ == "__main__":
    llm_train.create_training = _create_run
    run(train.main, define_config_flags)
