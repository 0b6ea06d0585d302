"""Token embedding, whose vocabulary is divided over the mesh."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.mesh import VOCAB_AXES, axis_size
from xlstm.distributed.tensor_parallel import embed_tokens, scatter_tokens
from xlstm.models.shared.parameters import boxed_parameter


class Embedding(nn.Module):
    """Looks token ids up in a table.

    Attributes:
        vocab_size: `V`.
        embedding_dim: `D`.
        init_fn: Initializer of the table.
        dtype: Type of the output.
    """

    vocab_size: int
    embedding_dim: int
    init_fn: Callable
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps ids `(B, T)` to the vectors of this device's tokens, `(B, T / tp, D)`."""
        shape = (self.vocab_size // axis_size(VOCAB_AXES), self.embedding_dim)
        table = boxed_parameter(self, "embedding", self.init_fn, shape, (VOCAB_AXES, None))
        # The gradient of a row is summed over its tokens in the type of the table.
        x = embed_tokens(table, tokens, VOCAB_AXES).astype(self.dtype)
        x = scatter_tokens(x, "tp")
        return lax.psum(x, "pp") if axis_size("pp") > 1 else x
