"""A model on devices, ready for inference."""

import dataclasses

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PyTree
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.trainer.base.param_utils import is_partitioned, unboxed


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on devices, ready for inference.

    Attributes:
        config: Configuration of the model.
        params: Unboxed parameters, not sharded over pipeline stages; see `reshard_for_inference`.
        mesh: The mesh that the parameters are placed on.
        tokenizer: The tokenizer of the training data; None if the model came without one.
        fingerprint: Identifies the checkpoint; empty for parameters that are not in one.
        eos_ids: Ids that end a text, besides the tokenizer's end-of-document id.
    """

    config: LanguageModelConfig
    params: PyTree
    mesh: Mesh
    tokenizer: Tokenizer | None
    fingerprint: str = ""
    eos_ids: tuple[int, ...] = ()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """All ids that end a text, ascending."""
        eod_id = {self.tokenizer.eod_id} if self.tokenizer else set()
        return tuple(sorted({*self.eos_ids, *eod_id}))


def reshard_for_inference(params: PyTree, mesh: Mesh) -> PyTree:
    """Reshards pipeline-parallel parameters so that every device has a part of every block.

    Outside of the pipeline every device runs all blocks, one after the other. XLA would gather a
    stack that is sharded along its axis of blocks.

    Args:
        params: Boxed parameters of a train state.
        mesh: The mesh.

    Returns:
        The unboxed parameters on the mesh, with `pp` on another axis than the blocks'.
    """
    if mesh.shape["pp"] == 1:
        return unboxed(params)

    def without_pp(box: PyTree) -> PyTree:
        names = tuple(None if name == "pp" else name for name in box.names)
        return box.replace(names=names)

    boxes = jax.tree.map(without_pp, params, is_leaf=is_partitioned)
    boxes = shard_parameters(boxes, mesh.shape["pp"], min_weight_size=0, axis_name="pp")
    specs = nn.get_partition_spec(boxes)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(lambda x: x, out_shardings=shardings)(unboxed(params))
