"""Passes of `decayed_attention` in segments of the sequence, so that few heads fill the card."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    Inputs,
    Options,
    Outputs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper_plan import num_blocks
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.token_gates import carry_over

Attend = Callable[[Inputs, Options], Outputs]

_LEAST_CHUNKS = 4  # In a segment; shorter ones cost more than they win.
_MULTIPROCESSORS = 132  # Of an H100; fewer blocks than these leave some of them idle.


def _segments(inputs: Inputs, blocks: int) -> int:
    """Returns into how many segments to cut the sequence, so that few heads fill the card."""
    num_chunks = inputs.keep.shape[1]
    segments = 1
    while (
        blocks * segments * 2 <= _MULTIPROCESSORS
        and num_chunks % (segments * 4) == 0
        and num_chunks // (segments * 2) >= _LEAST_CHUNKS
    ):
        segments *= 2
    return segments


def run_pass(attend: Attend, inputs: Inputs, options: Options) -> Outputs:
    """Runs a pass; with few heads, in segments that run side by side, after their first states.

    Args:
        attend: The implementation of `decayed_attention`.
        inputs: Its inputs, for one segment.
        options: Its options, likewise.

    Returns:
        Its outputs, likewise.
    """
    segments = _segments(inputs, num_blocks(inputs, options))
    if segments == 1:
        return attend(inputs, options)
    before, _ = _segment_states(attend, inputs, options.reverse, segments)
    inputs = inputs._replace(init=before)
    outputs = attend(inputs, dataclasses.replace(options, segments=segments))
    if options.emit_last:
        last = outputs.last.reshape(-1, segments, *before.shape[1:])
        outputs = outputs._replace(last=last[:, 0 if options.reverse else -1])
    return outputs


def _segment_states(
    attend: Attend, inputs: Inputs, reverse: bool, segments: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the states before each segment, in the shape of `Inputs.init`, and the last one."""
    n, num_chunks = inputs.keep.shape
    states_alone = Options(reverse=reverse, outputs=False, emit_last=True, segments=segments)
    alone = Inputs(None, inputs.b, inputs.x, inputs.gates, inputs.keep)
    added = attend(alone, states_alone).last
    dims = added.shape[1:]
    keep = jnp.prod(inputs.keep.reshape(n, segments, num_chunks // segments), axis=-1)
    initial = jnp.zeros((n, *dims), jnp.float32) if inputs.init is None else inputs.init
    before, last = carry_over(
        added.reshape(n, segments, -1), keep, initial.reshape(n, -1), reverse=reverse
    )
    return before.reshape(n * segments, *dims), last.reshape(n, *dims)


def last_state(attend: Attend, inputs: Inputs, reverse: bool) -> jax.Array:
    """Computes nothing but the last state; with few heads, in segments as well.

    Args:
        attend: The implementation of `decayed_attention`.
        inputs: Its inputs, for one segment; `a` is not read.
        reverse: Whether the state passes from the last chunk to the first.

    Returns:
        The state `(N, D, E)`, float32.
    """
    options = Options(reverse=reverse, outputs=False, emit_last=True)
    segments = _segments(inputs, num_blocks(inputs, options))
    return _segment_states(attend, inputs, reverse, segments)[1]
