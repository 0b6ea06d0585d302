"""Types and notation that all packages share.

Sizes in array shapes:

    B      examples in a batch              V     token ids in the vocabulary
    T      tokens in a sequence             D     channels of the residual stream
    L, NC  tokens in a chunk, chunks        NH    heads
    DHQK   channels of a head's query, key  DHV   channels of a head's value
    DH     channels of a head in the sLSTM  C     channels of any other kind

Inside `shard_map`, shapes are local, and the name of a mesh axis means its size: `T / tp` tokens.
There `T` is the number of tokens in this device's part of a sequence, if `cp` shards sequences.

Arguments and outputs of the mLSTM (M) and sLSTM (S) cells:

    q, k, v  M   queries, keys, values
    z        S   cell input, a pre-activation
    i, f, o  MS  input, forget and output gates, as pre-activations
    C        M   matrix memory              c     S   cell
    n        MS  normalizer                 m     MS  log scale: C, c and n are divided by exp(m)
    h        MS  output

Every layer with a state is called as `y, state = layer(x, reset, padding, state)`:

    x        local tokens, (B, T / tp, D)
    reset    bool (B, T), or None: True drops the state before that token, where a document starts
    padding  bool (B, T), or None: True marks tokens that do not change the state; they come last
             in an example, and their outputs are meaningless
    state    local state before the first token, or None for the zero state
    y        output, shaped like x
    state    (returned) state after the last token, or None if no state was given
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.training import train_state

PyTree = Any
PRNGKeyArray = jax.Array
# Types that a configuration can name.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Parameter = jax.Array | nn.Partitioned
# A metric is a sum, a pair (sum, count), or a tree of sums that its producer can interpret. The
# metrics of several minibatches are added leaf by leaf.
Metrics = dict[str, jax.Array | tuple[jax.Array, jax.Array] | PyTree]


class TrainState(train_state.TrainState):
    """The state that a training step reads and writes.

    Attributes:
        rng: Base random key of the run; each step derives its own key from it and `step`.
        params_ema: Moving average of the parameters, a tree like `params`; or None.
        grad_norm_mean: Moving average of the gradient norm, float32; 0 before the first step.
        skipped_steps: Number of steps whose update was skipped, int32.
        carried_state: Recurrent states after the last batch, one for each of its rows, on the
            second axis; None if every batch starts with the zero state.
    """

    rng: PRNGKeyArray
    params_ema: PyTree = None
    grad_norm_mean: jax.Array | float = 0.0
    skipped_steps: jax.Array | int = 0
    carried_state: PyTree = None
