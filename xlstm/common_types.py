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
# A metric is a sum, a pair (sum, count), or a tree of sums that its maker knows to read; metrics of
# several minibatches are added leaf by leaf.
Metrics = dict[str, jax.Array | tuple[jax.Array, jax.Array] | PyTree]


class TrainState(train_state.TrainState):
    """Everything that a training step reads and writes.

    Attributes:
        rng: Base random key of the run; a step derives its own key from it and from `step`.
        params_ema: Moving average of the parameters, a tree like them, or None.
        grad_norm_mean: Moving average of the gradient norm, float32; 0 before the first step.
        skipped_steps: Number of steps whose update was not made, int32.
    """

    rng: PRNGKeyArray
    params_ema: PyTree = None
    grad_norm_mean: jax.Array | float = 0.0
    skipped_steps: jax.Array | int = 0
