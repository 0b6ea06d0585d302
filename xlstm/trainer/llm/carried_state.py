"""The recurrent states that the rows of a run carry from batch to batch."""

import dataclasses
from typing import Self

import jax
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PyTree
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.models.xlstm_parallel.blocks.stack import carried_state, carried_state_specs
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.llm.config import RunConfig


@dataclasses.dataclass(frozen=True)
class CarriedState:
    """The states of a run's rows, in training and in evaluation.

    Attributes:
        model: Configuration of the model.
        batch_size: Number of rows of a global batch.
    """

    model: ModelConfig
    batch_size: int

    @classmethod
    def of_run(cls, config: RunConfig) -> Self | None:
        """Returns the states of a run; None unless it has `data.carry_state`."""
        return cls(config.model, config.data.batch_size) if config.data.carry_state else None

    @property
    def specs(self) -> PyTree:
        """Their partition specs."""
        return carried_state_specs(self.model.pattern, BATCH_AXES)

    def zeros(self) -> PyTree:
        """Returns the states before a document; see `stack.carried_state`."""
        return carried_state(self.model, self.batch_size)

    def create(self, mesh: Mesh) -> PyTree:
        """Returns the states before a document, on a mesh."""
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), self.specs)
        return jax.jit(self.zeros, out_shardings=shardings)()
