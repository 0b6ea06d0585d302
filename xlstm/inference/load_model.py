"""Loads a model from a checkpoint, for all that is not training."""

import dataclasses

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PyTree
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.distributed.mesh import create_mesh
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.trainer.base.param_utils import is_partitioned, unboxed
from xlstm.trainer.checkpoints.read_params import read_fingerprint, read_params, read_run_info
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import check_model
from xlstm.trainer.llm.language_model import abstract_params
from xlstm.trainer.llm.run_tokenizer import read_eos_ids, read_tokenizer
from xlstm.trainer.llm.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to write.

    Attributes:
        config: Its configuration.
        params: Its parameters, without boxes, not cut into pipeline stages.
        mesh: Where they are.
        tokenizer: What it was trained with; None if it came without one.
        fingerprint: Differs between checkpoints; empty if it is of none.
        eos_ids: Ids that end texts, besides the tokenizer's marker.
    """

    config: LanguageModelConfig
    params: PyTree
    mesh: Mesh
    tokenizer: Tokenizer | None
    fingerprint: str = ""
    eos_ids: tuple[int, ...] = ()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All ids that end texts, ascending."""
        marker = {self.tokenizer.eod_id} if self.tokenizer else set()
        return tuple(sorted({*self.eos_ids, *marker}))


def without_stages(params: PyTree, mesh: Mesh) -> PyTree:
    """Cuts stacks of blocks along another dimension than that of the blocks.

    Outside of the pipeline every device runs all blocks, one after the other: of a stack that is
    cut by blocks XLA would bring all blocks together first.

    Args:
        params: Boxed parameters of a train state.
        mesh: The mesh.

    Returns:
        The same parameters, placed anew on the mesh, without boxes.
    """
    if mesh.shape["pp"] == 1:
        return unboxed(params)

    def free(box: PyTree) -> PyTree:
        names = tuple(None if name == "pp" else name for name in box.names)
        return box.replace(names=names)

    freed = jax.tree.map(free, params, is_leaf=is_partitioned)
    cut = shard_parameters(freed, mesh.shape["pp"], min_weight_size=0, axis_name="pp")
    specs = nn.get_partition_spec(cut)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    return jax.jit(lambda x: x, out_shardings=shardings)(unboxed(params))


def load_model(config: RunConfig, workdir: Workdir, step: int) -> LoadedModel:
    """Loads a checkpoint: the moving average of its parameters, if there is one.

    Args:
        config: The run's configuration, but for the mesh, which is where to load it.
        workdir: The run's folder.
        step: The checkpoint's step.

    Raises:
        ValueError: If it does not fit on the mesh, or its tokenizer is missing or another one.
        CheckpointGone: If it has been removed meanwhile.
        OSError: If it cannot be read.
    """
    mesh = create_mesh(config.mesh)
    check_model(config.model, mesh)
    tokenizer = read_tokenizer(workdir, read_run_info(workdir.checkpoints, step))
    eos_ids = read_eos_ids(workdir, config.model.vocab_size)
    like, _ = abstract_params(config, mesh)
    params = without_stages(read_params(workdir.checkpoints, step, like), mesh)
    fingerprint = read_fingerprint(workdir.checkpoints, step)
    return LoadedModel(config.language_model, params, mesh, tokenizer, fingerprint, eos_ids)
