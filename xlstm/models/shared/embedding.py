"""Token embedding."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

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
        """Maps ids `(B, T)` to vectors `(B, T, D)`."""
        shape = (self.vocab_size, self.embedding_dim)
        table = boxed_parameter(self, "embedding", self.init_fn, shape, ("tp", None))
        return jnp.take(table, tokens, axis=0).astype(self.dtype)
