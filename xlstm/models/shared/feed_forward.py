"""The gated feed-forward layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.tensor_parallel import column_parallel, row_parallel
from xlstm.models.shared.linear import Dense, small_init, wang_init


def feed_forward_dim(embedding_dim: int, proj_factor: float, round_up_to: int) -> int:
    """Returns the hidden size: `proj_factor * D` rounded up to a multiple of `round_up_to`."""
    return -(-int(embedding_dim * proj_factor) // round_up_to) * round_up_to


class GatedFeedForward(nn.Module):
    """`proj_down(activation(proj_up_gate(x)) * proj_up(x))`: SwiGLU, or GEGLU with `nn.gelu`.

    Attributes:
        hidden_dim: Hidden size, between the projections.
        num_blocks: Number of residual blocks in the model, for the initial scale.
        dtype: Type of the computation.
        overlap: Whether to overlap the communication over `tp` with the products.
        activation: Activation of the gate.
        precision: See `product_precision`.

    References:
        Shazeer, "GLU Variants Improve Transformer", 2020, eq. 6.
    """

    hidden_dim: int
    num_blocks: int
    dtype: jnp.dtype = jnp.float32
    overlap: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    precision: lax.Precision | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps local tokens `(B, T / tp, D)` to outputs of the same shape."""
        embedding_dim = x.shape[-1]
        numerics = {"dtype": self.dtype, "precision": self.precision}

        def up(name: str) -> Dense:
            init_fn = small_init(embedding_dim)
            return Dense(self.hidden_dim, init_fn, (None, "tp"), **numerics, name=name)

        gate, value = up("proj_up_gate"), up("proj_up")
        down_init = wang_init(embedding_dim, self.num_blocks)
        down = Dense(embedding_dim, down_init, ("tp", None), **numerics, name="proj_down")
        hidden = column_parallel(
            lambda x: self.activation(gate(x)) * value(x), x, "tp", overlap=self.overlap
        )
        return row_parallel(down, hidden, "tp", overlap=self.overlap)
