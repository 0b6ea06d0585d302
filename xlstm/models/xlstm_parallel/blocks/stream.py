"""What goes from block to block."""

from typing import NamedTuple

import jax
from jax import lax

from xlstm.common_types import PRNGKeyArray, PyTree


class BlockPlace(NamedTuple):
    """Where a block stands in the model; int32 scalars that count from 0.

    Attributes:
        number: Among all blocks.
        of_kind: Among the blocks of its kind.
    """

    number: jax.Array
    of_kind: jax.Array


class Stream(NamedTuple):
    """What goes from block to block, with the examples on the leading axis.

    Attributes:
        x: This device's tokens, `(B, T / tp, D)`.
        reset: Where the state is dropped before the token, bool `(B, T)`, or None.
        dropout_keys: A random key for each of this device's tokens, `(B, T / tp, ...)`, or None.
        padding: True for tokens that leave no trace in any state, bool `(B, T)`, or None. They are
            the last ones of an example.
        states: The states of all blocks before the first token, or None: for a block, those of its
            kind, leading axes `(number of these blocks, B)`. Each block replaces its own, in place
            where XLA can.
    """

    x: jax.Array
    reset: jax.Array | None = None
    dropout_keys: PRNGKeyArray | None = None
    padding: jax.Array | None = None
    states: PyTree | None = None

    def state_of(self, place: BlockPlace) -> PyTree | None:
        """The state of one block, without the axis of the blocks."""
        return jax.tree.map(
            lambda states: lax.dynamic_index_in_dim(states, place.of_kind, keepdims=False),
            self.states,
        )

    def after(self, place: BlockPlace, x: jax.Array, state: PyTree | None) -> "Stream":
        """What one block hands on: its output, and its state replaced."""
        states = jax.tree.map(
            lambda states, new: lax.dynamic_update_index_in_dim(states, new, place.of_kind, 0),
            self.states,
            state,
        )
        return self._replace(x=x, states=states)
