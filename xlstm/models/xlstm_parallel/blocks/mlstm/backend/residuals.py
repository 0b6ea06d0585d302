"""What the forward pass of `fwbw` keeps for its backward pass, and how the rest is recomputed.

`inputs_of_part` and `add_scale_gradients` serve both implementations.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax

from xlstm.distributed.context_parallel import only_in_first_part
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    ChunkGates,
    chunk_gates,
    fold_state,
    log_scales,
    split_chunks,
    unfold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    gradient_of_last_m,
    pair_log_weights,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMArguments,
    MLSTMInputs,
    MLSTMState,
    state_product,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.sequence_parts import (
    scale_gradient_after_part,
)


class FwbwContext(NamedTuple):
    """Residuals of the forward pass for the backward pass.

    Attributes:
        arguments: Arguments of the forward pass.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        h: Output `(N, NC, L, DHV)`, in the type of the values.
        qn: `n_t . q_t`, `(N, NC, L)`.
        first_state: State before this device's part of the sequences, leading axis `N`; None if
            they are not sharded.
        last_state: State after the last token, or after this part.
        gates: Gates of the chunks with `keep_gates`, else None.
        m: Log scale of every token `(N, NC, L)` with `keep_M`, else None.
        weights: Weights of the pairs `(N, NC, L, L)` with `keep_G` on a CPU, else None.
        scores: Gated scores of the pairs `(N, NC, L, L)` with `keep_G`, else None; divided as by
            `programs.split_denominator`.
        before: State before every chunk, leading axes `(N, NC)`, with `keep_c`, else None.
    """

    arguments: MLSTMArguments
    reset: jax.Array | None
    h: jax.Array
    qn: jax.Array
    first_state: MLSTMState | None
    last_state: MLSTMState
    gates: ChunkGates | None
    m: jax.Array | None
    weights: jax.Array | None
    scores: jax.Array | None
    before: MLSTMState | None

    @property
    def chunk_size(self) -> int:
        """The number of tokens in a chunk, `L`."""
        return self.qn.shape[2]


def split_tokens(inputs: MLSTMInputs, chunk_size: int | None) -> list[jax.Array]:
    """Splits the tokens into chunks.

    Args:
        inputs: Inputs over `T` tokens.
        chunk_size: Number of tokens in a chunk; None for one chunk.

    Returns:
        `q`, `k` and `v`, each `(N, NC, L, DHQK or DHV)`.
    """
    return [split_chunks(x, inputs.i.ndim - 1, chunk_size) for x in (inputs.q, inputs.k, inputs.v)]


class Recomputed(NamedTuple):
    """Intermediate results of the forward pass, as in `FwbwContext`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    gates: ChunkGates
    before: MLSTMState
    m: jax.Array


def recompute(
    ctx: FwbwContext,
    inputs: MLSTMInputs,
    states: Callable[..., tuple[MLSTMState, MLSTMState]],
    precision: lax.Precision | None,
) -> Recomputed:
    """Takes from the residuals what was kept, and recomputes the rest.

    Args:
        ctx: Residuals.
        inputs: Prepared arguments of `ctx`.
        states: `chunk_states`, or a function that does the same.
        precision: See `product`.

    Returns:
        The intermediate results.
    """
    gates, m, before = ctx.gates, ctx.m, ctx.before
    q, k, v = split_tokens(inputs, ctx.chunk_size)
    if gates is None:
        gates = chunk_gates(inputs.i, inputs.log_f, ctx.reset, ctx.chunk_size)
    if before is None:
        before, _ = states(k, v, gates, fold_state(inputs.state), precision)
    if m is None:
        log_weights = pair_log_weights(gates.i, gates.log_f, gates.document)
        m = log_scales(log_weights, gates, before.m)
    return Recomputed(q, k, v, gates, before, m)


def inputs_of_part(inputs: MLSTMInputs, first_state: MLSTMState | None) -> MLSTMInputs:
    """Returns the inputs with the state before this device's part of the sequences.

    Args:
        inputs: Prepared arguments, with the state before the first part.
        first_state: State before this part, leading axis `N`; None if there are no parts.

    Returns:
        The inputs; for None, unchanged.
    """
    if first_state is None:
        return inputs
    return inputs._replace(state=unfold_state(first_state, inputs.state.m.shape))


def add_scale_gradients(
    inputs: MLSTMInputs,
    gradients: MLSTMInputs,
    reset: jax.Array | None,
    last_state: MLSTMState,
    d_last: MLSTMState | None,
    context_axis: str | None,
) -> MLSTMInputs:
    """Adds the gradients through the log scales of the initial and the last state.

    Args:
        inputs: Prepared arguments.
        gradients: Their gradients, without the paths through `m`.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        last_state: State after the last token, or after this part; not read without `d_last`.
        d_last: Gradient of the last state; None for zero.
        context_axis: Mesh axis that the tokens are sharded over, or None.

    Returns:
        The gradients; that of the initial `m` replaces the given one.
    """
    d_i, d_log_f, d_initial = gradients[3:]
    d_m = state_product(inputs.state, d_initial)
    if d_last is not None:
        d_last_m = d_last.m - state_product(last_state, d_last)
        more_i, more_f, is_carried = gradient_of_last_m(
            inputs.i, inputs.log_f, inputs.state.m, reset
        )
        if context_axis:
            d_last_m = scale_gradient_after_part(d_last_m, is_carried, context_axis)
            is_carried = only_in_first_part(is_carried, context_axis)
        d_i, d_log_f = d_i + more_i * d_last_m[..., None], d_log_f + more_f * d_last_m[..., None]
        d_m += is_carried * d_last_m
    return gradients._replace(i=d_i, log_f=d_log_f, state=d_initial._replace(m=d_m))
