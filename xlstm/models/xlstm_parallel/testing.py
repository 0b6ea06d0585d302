"""Small models for tests."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.distributed.data_parallel import shard_parameters
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel


def small_config(
    backend: str = "fwbw", chunk_size: int = 4, **model_options
) -> LanguageModelConfig:
    """Returns the configuration of a model with 3 blocks, 2 heads and 11 token ids."""
    sizes = {
        "vocab_size": 11,
        "embedding_dim": 16,
        "num_blocks": 3,
        "num_heads": 2,
        "ffn_round_up_to_multiple_of": 8,
    }
    return LanguageModelConfig(
        ModelConfig(**sizes | model_options), BackendConfig(backend, chunk_size)
    )


def lively_params(config: LanguageModelConfig, rng: PRNGKeyArray) -> PyTree:
    """Returns unboxed parameters far from the initial ones, so that every gate varies.

    Args:
        config: Configuration of the model.
        rng: Random key.

    Returns:
        The collection `params`, of plain arrays.
    """
    model = xLSTMLMModel(config)
    params = jax.eval_shape(model.init, rng, jnp.zeros((1, 2), int))["params"]
    leaves, structure = jax.tree.flatten(nn.meta.unbox(params))
    keys = jax.random.split(rng, len(leaves))
    leaves = [
        0.4 * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def place_params(params: PyTree, config: LanguageModelConfig, mesh: Mesh) -> PyTree:
    """Returns parameters on a mesh, sharded over every axis that they can be sharded over.

    Args:
        params: Unboxed parameters, as from `lively_params`.
        config: Configuration of the model.
        mesh: The mesh, without pipeline stages.
    """
    init = xLSTMLMModel(config).init
    boxes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    boxes = shard_parameters(boxes, mesh.shape["fsdp"], min_weight_size=1)
    specs = nn.get_partition_spec(boxes)
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs)
