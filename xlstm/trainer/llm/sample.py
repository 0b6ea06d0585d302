"""Text that a model writes."""

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PyTree
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.models.xlstm_parallel.generate import sample_tokens
from xlstm.trainer.base.param_utils import is_partitioned, unboxed
from xlstm.trainer.llm.config import RunConfig


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


def sample_text(config: RunConfig, params: PyTree, tokenizer: Tokenizer) -> str:
    """Samples text as `config.logger` says.

    Args:
        config: The run's configuration.
        params: Parameters of the model.
        tokenizer: The tokenizer of the data.

    Returns:
        The prompt and what follows, up to the end of the document.
    """
    prompt = [tokenizer.eod_id, *tokenizer.encode(config.logger.sample_prompt).tolist()]
    ids = sample_tokens(
        params,
        np.asarray([prompt], np.int32),
        jax.random.PRNGKey(config.trainer.seed),
        config=config.language_model,
        num_tokens=config.logger.sample_tokens,
        temperature=config.logger.sample_temperature,
        vocab_size=tokenizer.vocab_size,
    )
    ids = np.asarray(ids[0]).tolist()
    if tokenizer.eod_id in ids:
        ids = ids[: ids.index(tokenizer.eod_id)]
    return config.logger.sample_prompt + tokenizer.decode(ids)
