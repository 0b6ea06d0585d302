"""Sequences in parts for the kernels: one more pass of states alone on each way.

`sequence_parts` has what the devices exchange.
"""

import jax
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import fold_state
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import CHUNK, Inputs, Row
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMArguments,
    MLSTMState,
    check_reset,
    prepare_inputs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.segments import Attend, last_state
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.sequence_parts import (
    empty_state,
    gradient_after_part,
    state_before_part,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.token_gates import (
    TokenGates,
    Tokens,
    carry_over,
    pad_state,
    token_gates,
    weighted_sums,
)


def mosaic_state_before_part(
    arguments: MLSTMArguments, reset: jax.Array | None, context_axis: str, attend: Attend
) -> MLSTMState:
    """Computes the state before this device's part of the sequences.

    Args:
        arguments: Arguments of the backend; the initial state is that before the first part.
        reset: See `mLSTMBackend.__call__`.
        context_axis: Mesh axis that the tokens are sharded over.
        attend: The implementation of `decayed_attention`.

    Returns:
        The state, leading axis `N`.
    """
    inputs = prepare_inputs(arguments)
    reset = check_reset(reset, inputs.i.shape)
    *leading, time, qk_dim = arguments.k.shape
    tokens = Tokens(tuple(leading), time)
    k, v = tokens.fold(arguments.k), tokens.fold(arguments.v)
    from_nothing = inputs._replace(state=empty_state(inputs.state))
    gates = token_gates(from_nothing, reset, tokens.padding)
    # A pass of states alone reads no other row.
    rows = jnp.zeros((*gates.keep.shape, len(Row), CHUNK), gates.write.dtype)
    rows = rows.at[:, :, Row.WRITE].set(gates.write)
    C = last_state(attend, Inputs(None, k, v, rows, gates.keep), reverse=False)
    sums = weighted_sums(tokens, k, gates.write)
    _, n = carry_over(sums, gates.keep, jnp.zeros_like(sums[:, 0]), reverse=False)
    added = MLSTMState(C[:, :qk_dim, : arguments.v.shape[-1]], n[:, :qk_dim], gates.last_m)
    log_decay = jnp.sum(gates.chunk.carry[..., -1], axis=-1)
    return state_before_part(added, log_decay, fold_state(inputs.state), context_axis)


def mosaic_gradient_after_part(
    before: jax.Array,
    gates: TokenGates,
    last: jax.Array | None,
    dims: tuple[int, ...],
    context_axis: str,
) -> jax.Array:
    """Computes the gradient of C, or of n, after this device's part, through all later parts.

    Args:
        before: Gradient before the part, through the outputs of this part alone, padded.
        gates: The gates.
        last: Gradient after the last part, padded, the same on all devices; None for zero.
        dims: Sizes without padding.
        context_axis: Mesh axis that the tokens are sharded over.

    Returns:
        The gradient, padded.
    """
    features = (slice(None), *map(slice, dims))
    before, last = before[features], 0.0 if last is None else last[features]
    keep = jnp.prod(gates.keep, axis=-1)
    return pad_state(gradient_after_part(before, keep, last, context_axis))
