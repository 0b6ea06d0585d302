"""Sequences in parts on the devices of a mesh axis: the states, and their gradients, between them.

A device computes the states between its chunks as if nothing came before its part. Its last state
and its decay are the summary of the part. The devices combine the summaries of all earlier parts,
and each adds the resulting state, decayed, to its own. The backward pass does the same with the
gradients of the states, from the last part to the first. `docs/long_context.md` derives both.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xlstm.common_types import PyTree
from xlstm.distributed.context_parallel import (
    INCOMING_STATE,
    combine_earlier,
    of_last_part,
    only_in_first_part,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    PADDING_GATE,
    ChunkGates,
    exp_decay,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import rev_cumsum
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMState

_Gradient = tuple[jax.Array, jax.Array]  # Of C and n.


class _Summary(NamedTuple):
    """What some consecutive tokens do to the state before them; leading axis `N`.

    Attributes:
        log_decay: Log weight of the state before the tokens in the state after them; -inf after a
            reset.
        state: What the tokens add. Its `m` also bounds that of the zero state after a reset.
    """

    log_decay: jax.Array
    state: MLSTMState


_NOTHING = _Summary(0.0, MLSTMState(0.0, 0.0, PADDING_GATE))


def empty_state(like: MLSTMState) -> MLSTMState:
    """Returns the state of no tokens: unlike the zero state, it does not bound `m`."""
    return MLSTMState(
        jnp.zeros_like(like.C), jnp.zeros_like(like.n), jnp.full_like(like.m, PADDING_GATE)
    )


def _combine(earlier: _Summary, later: _Summary) -> _Summary:
    """Returns the summary of earlier and later tokens; leading axes broadcast."""
    log_decay, state = later
    carried = log_decay + earlier.state.m
    m = jnp.maximum(carried, state.m)
    keep, add = jnp.exp(carried - m), jnp.exp(state.m - m)
    return _Summary(
        earlier.log_decay + log_decay,
        MLSTMState(
            C=keep[..., None, None] * earlier.state.C + add[..., None, None] * state.C,
            n=keep[..., None] * earlier.state.n + add[..., None] * state.n,
            m=m,
        ),
    )


def state_before_part(
    added: MLSTMState, log_decay: jax.Array, initial: MLSTMState, axis_name: str
) -> MLSTMState:
    """Returns the state before this device's part of the sequences.

    Args:
        added: State after the part, computed from `empty_state`, leading axis `N`.
        log_decay: Sum of the log forget gates of the part `(N,)`; -inf after a reset.
        initial: State before the first part, the same on all devices.
        axis_name: The mesh axis.

    Returns:
        The state, leading axis `N`.
    """
    before = combine_earlier(_combine, _Summary(log_decay, added), _NOTHING, axis_name)
    state = _combine(_Summary(jnp.zeros_like(log_decay), initial), before).state
    return jax.tree.map(lambda x: checkpoint_name(x, INCOMING_STATE), state)


def states_of_part(
    chunk_states: Callable[..., tuple[MLSTMState, MLSTMState]],
    k: jax.Array,
    v: jax.Array,
    gates: ChunkGates,
    initial: MLSTMState,
    axis_name: str,
) -> tuple[MLSTMState, MLSTMState, MLSTMState]:
    """Computes the states between the chunks of this device's part.

    Args:
        chunk_states: `chunks.chunk_states` without a precision, or a function that does the same.
        k: Keys `(N, NC, L, DHQK)`.
        v: Values `(N, NC, L, DHV)`.
        gates: Gates of the chunks.
        initial: State before the first part, leading axis `N`, the same on all devices.
        axis_name: The mesh axis.

    Returns:
        The state before every chunk, leading axes `(N, NC)`, the state after the part, and the
        state before it.
    """
    before, last = chunk_states(k, v, gates, empty_state(initial))
    log_decays = jnp.cumsum(gates.carry[..., -1], axis=-1)
    first = state_before_part(last, log_decays[:, -1], initial, axis_name)
    to_chunk = jnp.pad(log_decays[:, :-1], [(0, 0), (1, 0)])
    whole = jax.tree.map(lambda x: x[:, None], first)
    whole = _combine(_Summary(0.0, whole), _Summary(to_chunk, before)).state
    whole = whole._replace(C=whole.C.astype(before.C.dtype))
    last = _combine(_Summary(0.0, first), _Summary(log_decays[:, -1], last)).state
    return whole, last, first


def gradient_after_part(before: PyTree, keep: jax.Array, last: PyTree, axis_name: str) -> PyTree:
    """Returns the gradient of the state after this device's part, through all later parts.

    Args:
        before: Gradients of `C`, of `n` or of both before the part, through the outputs of this
            part alone, leading axis `N`.
        keep: Factor of the state before the part in the state after it `(N,)`.
        last: Gradients after the last part, the same on all devices, like `before`.
        axis_name: The mesh axis.

    Returns:
        The gradients after this part, like `before`.
    """

    def combine(later, earlier):
        (later_keep, later_sums), (keep, sums) = later, earlier
        return later_keep * keep, _add_decayed(sums, keep, later_sums)

    identity = 1.0, jax.tree.map(lambda _: 0.0, before)
    keep, sums = combine_earlier(combine, (keep, before), identity, axis_name, reverse=True)
    return _add_decayed(sums, keep, last)


def gradients_of_part(
    local: _Gradient,
    local_initial: _Gradient,
    gates: ChunkGates,
    m: jax.Array,
    last: _Gradient,
    axis_name: str,
) -> tuple[_Gradient, _Gradient]:
    """Computes the gradients of the states between the chunks of this device's part.

    Args:
        local: Gradients of `C` and `n` after every chunk, through the outputs of this part alone,
            leading axes `(N, NC)`.
        local_initial: The same before the part, leading axis `N`.
        gates: Gates of the chunks.
        m: Log scales of the states before the chunks and of the last one, `(N, NC + 1)`.
        last: Gradient of `C` and `n` after the last part, the same on all devices.
        axis_name: The mesh axis.

    Returns:
        The gradients of `C` and `n` after every chunk, and this device's part of those of the
        initial ones, which are zero except in the first part.
    """
    log_decays = jnp.pad(rev_cumsum(gates.carry[..., -1]), [(0, 0), (0, 1)])
    keep = exp_decay(log_decays + m - m[:, -1:])
    after = gradient_after_part(local_initial, keep[:, 0], last, axis_name)
    expanded = jax.tree.map(lambda x: x[:, None], after)
    d_C, d_n = _add_decayed(local, keep[:, 1:], expanded)
    initial = _add_decayed(local_initial, keep[:, 0], after)
    return (d_C.astype(local[0].dtype), d_n), only_in_first_part(initial, axis_name)


def _add_decayed(x: PyTree, keep: jax.Array, y: PyTree) -> PyTree:
    """Returns `x + keep y`, where the arrays of `x` and `y` have more trailing axes than `keep`."""

    def add(x, y):
        return x + jnp.expand_dims(keep, range(keep.ndim, x.ndim)) * y

    return jax.tree.map(add, x, y)


def scale_gradient_after_part(d_m: jax.Array, is_carried: jax.Array, axis_name: str) -> jax.Array:
    """Returns the gradient of `m` after this device's part, through the maxima of later parts.

    Args:
        d_m: Gradient of the last `m`, as the device of the last part knows it `(...)`.
        is_carried: 1 where `m` after a part comes from `m` before it, else 0, `(...)`.
        axis_name: The mesh axis.

    Returns:
        The gradient `(...)`.
    """
    passed = combine_earlier(
        lambda later, earlier: later * earlier, is_carried, 1.0, axis_name, reverse=True
    )
    return passed * of_last_part(d_m, axis_name)
