"""A use of the library from another workspace: run `../../bazelw test //...` in this folder."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.distributed.mesh import BATCH_AXES, MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel


def main():
    """Builds a mesh and a small model, and predicts the next token for a batch on the mesh."""
    mesh = create_mesh(MeshConfig(dp=-1))
    config = LanguageModelConfig(ModelConfig(vocab_size=256, embedding_dim=32, num_blocks=2))
    model = xLSTMLMModel(config)
    tokens = jnp.zeros((2 * mesh.size, 16), jnp.int32)
    tokens = jax.device_put(tokens, NamedSharding(mesh, P(BATCH_AXES)))
    params = model.init(jax.random.key(0), tokens)
    logits = jax.jit(model.apply)(params, tokens)
    if logits.shape != (*tokens.shape, 256) or not jnp.isfinite(logits).all():
        raise SystemExit(f"unexpected logits: {logits}")
    print(f"logits of shape {logits.shape} on {mesh}")


if __name__ == "__main__":
    main()
