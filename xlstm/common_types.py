"""Types that every layer of the system shares."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training import train_state

PyTree = Any
PRNGKeyArray = jax.Array
# The types that a configuration may name.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Parameter = jax.Array | nn.Partitioned
# A metric is a sum, or a pair (sum, count); metrics of several minibatches are added leaf by leaf.
Metrics = dict[str, jax.Array | tuple[jax.Array, jax.Array]]


class TrainState(train_state.TrainState):
    """Everything that a training step reads and writes.

    Attributes:
        rng: Base random key of the run; a step derives its own key from it and from `step`.
        mutable_variables: Flax collections other than `params`, or None.
    """

    rng: PRNGKeyArray
    mutable_variables: PyTree = None
