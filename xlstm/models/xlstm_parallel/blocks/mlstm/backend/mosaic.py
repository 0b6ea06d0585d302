"""The chunkwise mLSTM by decayed attention: four kernels, and the gates and normalizers in XLA.

Every pass is one `decayed_attention`, so that no state has to leave the chip, except for one
thing: the exact gradient of the forget gates needs the products of the states with their gradients,
and the backward pass reads the states for it. `docs/gpu.md` has the picture, and `docs/mlstm.md`
the equations.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.context_parallel import of_last_part, only_in_first_part
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    fold_state,
    merge_chunks,
    unfold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    CHUNK,
    Inputs,
    Options,
    Row,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import gradients_of_gates
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import decayed_attention_hopper
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMArguments,
    MLSTMInputs,
    MLSTMState,
    check_reset,
    prepare_inputs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic_parts import (
    mosaic_gradient_after_part,
    mosaic_state_before_part,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import (
    bound_gradient,
    denominator,
    normalizer_bound,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.residuals import (
    add_scale_gradients,
    inputs_of_part,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.segments import (
    Attend,
    last_state,
    run_pass,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.token_gates import (
    TokenGates,
    Tokens,
    carry_over,
    gate_rows,
    pad_state,
    read_vector,
    token_gates,
    weighted_sums,
)

# On tensor cores, each factor as the sum of two bfloat16 numbers: relative errors below 2^-16.
_TWO_PARTS = lax.DotAlgorithmPreset.BF16_BF16_F32_X3


class MosaicContext(NamedTuple):
    """Residuals of the forward pass for the backward pass.

    Attributes:
        arguments: Arguments of the forward pass.
        reset: Bool `(..., T)`, True where the state is dropped before the token; or None.
        h: Output as the kernels have it, `(B, T, NH * DHV)`.
        qn: `n_t . q_t`, `(N, NC, L)`.
        before_n: `n` before every chunk `(N, NC, DHQK)`.
        first_state: State before this device's part of the sequences, leading axis `N`; None if
            they are not sharded.
        last_state: State after the last token, or after this part; `C` is None if it is not
            returned.
        gates: The gates.
        states: `C` before every second chunk `(N * NS, DHQK, DHV)`, bfloat16, with `keep_c`, else
            None.
    """

    arguments: MLSTMArguments
    reset: jax.Array | None
    h: jax.Array
    qn: jax.Array
    before_n: jax.Array
    first_state: MLSTMState | None
    last_state: MLSTMState
    gates: TokenGates
    states: jax.Array | None


def mosaic_forward(
    arguments: MLSTMArguments,
    first_state: MLSTMState | None,
    reset: jax.Array | None,
    *,
    stabilize_correctly: bool,
    keep_states: bool,
    return_state: bool,
    attend: Attend,
) -> tuple[jax.Array, MosaicContext]:
    """Runs the forward pass.

    Args:
        arguments: Arguments of the backend.
        first_state: See `MosaicContext`.
        reset: See `mLSTMBackend.__call__`.
        stabilize_correctly: See `mLSTMBackendFwbwConfig`.
        keep_states: Whether the states before the chunks are kept for the backward pass.
        return_state: Whether to compute the last `C`.
        attend: The implementation of `decayed_attention`.

    Returns:
        `h (..., T, DHV)` in the type of `v`, and the residuals for `mosaic_backward`.

    Raises:
        ValueError: If shapes or types are wrong, or the initial state is incomplete.
    """
    inputs = inputs_of_part(prepare_inputs(arguments), first_state)
    reset = check_reset(reset, inputs.i.shape)
    *leading, time, qk_dim = arguments.q.shape
    tokens = Tokens(tuple(leading), time)
    gates = token_gates(inputs, reset, tokens.padding)
    q, k, v = (tokens.fold(x) for x in arguments[:3])

    initial = fold_state(inputs.state)
    before_n, last_n = carry_over(
        weighted_sums(tokens, k, gates.write), gates.keep, pad_state(initial.n), reverse=False
    )
    carried_qn = read_vector(tokens, q, before_n) * gates.read
    bound = normalizer_bound(gates.m, stabilize_correctly)
    has_initial = first_state is not None or arguments.initial_C is not None
    results = run_pass(
        attend,
        Inputs(
            a=q,
            b=k,
            x=v,
            gates=gate_rows(gates, qk_dim, 0, 1, carried_qn, bound),
            keep=gates.keep,
            init=pad_state(initial.C) if has_initial else None,
        ),
        Options(normalize=True, emit_states=keep_states, emit_last=return_state),
    )
    last_C = None
    if return_state:
        last_C = results.last[:, :qk_dim, : arguments.v.shape[-1]].reshape(inputs.state.C.shape)
    last_n = last_n[:, :qk_dim].reshape(inputs.state.n.shape)
    context = MosaicContext(
        arguments=arguments,
        reset=reset,
        h=results.out,
        qn=results.normalizer,
        before_n=before_n,
        first_state=first_state,
        last_state=MLSTMState(last_C, last_n, gates.last_m.reshape(inputs.state.m.shape)),
        gates=gates,
        states=results.states,
    )
    h = tokens.unfold(results.out, arguments.v.shape[-1])
    return h.astype(arguments.v.dtype), context


def mosaic_backward(
    ctx: MosaicContext,
    dh: jax.Array,
    d_last: MLSTMState | None,
    *,
    stabilize_correctly: bool,
    context_axis: str | None,
    attend: Attend,
) -> MLSTMArguments:
    """Runs the backward pass; see `fwbw_backward` for what it is the gradient of.

    Args:
        ctx: Residuals that `mosaic_forward` returned.
        dh: Gradient of the output `(..., T, DHV)`.
        d_last: Gradient of the last state; None for zero.
        stabilize_correctly: See `mLSTMBackendFwbwConfig`.
        context_axis: See `mlstm_mosaic`.
        attend: The implementation of `decayed_attention`.

    Returns:
        The gradients of the arguments; None for those that were not given.
    """
    if d_last is not None and context_axis:
        d_last = lax.psum(d_last, context_axis)
    inputs, pull_back = jax.vjp(prepare_inputs, ctx.arguments)
    # See `fwbw_backward`.
    ctx, inputs, dh, d_last = lax.optimization_barrier((ctx, inputs, dh, d_last))
    inputs = inputs_of_part(inputs, ctx.first_state)
    d_q, d_k, d_v, d_i, d_log_f, d_initial = _token_gradients(
        ctx, inputs.state, dh, d_last, stabilize_correctly, context_axis, attend
    )
    leading = inputs.state.m.shape
    d_initial = unfold_state(MLSTMState(*d_initial, jnp.zeros(math.prod(leading))), leading)
    d_i, d_log_f = (merge_chunks(x, leading, inputs.i.shape[-1]) for x in (d_i, d_log_f))
    if ctx.reset is not None:
        d_log_f = jnp.where(ctx.reset, 0, d_log_f)
    # The gates' and the states' path; q, k and v do not go through `prepare_inputs` here.
    zeros = (jnp.zeros_like(x) for x in inputs[:3])
    gradients = MLSTMInputs(*zeros, d_i, d_log_f, d_initial)
    if stabilize_correctly:
        gradients = add_scale_gradients(
            inputs, gradients, ctx.reset, ctx.last_state, d_last, context_axis
        )
    (through,) = pull_back(gradients)
    return through._replace(q=d_q, k=d_k, v=d_v)


def _token_gradients(
    ctx: MosaicContext,
    initial: MLSTMState,
    dh: jax.Array,
    d_last: MLSTMState | None,
    stabilize_correctly: bool,
    context_axis: str | None,
    attend: Attend,
):
    """Returns the gradients of q, k, v, of the gates in chunks, and of the initial C and n."""
    arguments, gates, keep = ctx.arguments, ctx.gates, ctx.gates.keep
    *leading, time, qk_dim = arguments.q.shape
    v_dim = arguments.v.shape[-1]
    tokens = Tokens(tuple(leading), time)
    q, k, v, dh = (tokens.fold(x) for x in (*arguments[:3], dh))
    initial_C = last_dC = None
    last_dn = jnp.zeros_like(ctx.before_n[:, 0])
    if context_axis or arguments.initial_C is not None:
        initial_C = pad_state(fold_state(initial).C)
    if d_last is not None:
        last_dC, last_dn = (pad_state(x.astype(jnp.float32)) for x in fold_state(d_last)[:2])

    bound = normalizer_bound(gates.m, stabilize_correctly)
    norm = denominator(ctx.qn, gates.m, stabilize_correctly)
    bias = jnp.zeros_like(norm)
    rows = gate_rows(gates, qk_dim, jnp.log(norm), norm, bias, gates.last)
    if context_axis:
        before = last_state(attend, Inputs(None, q, dh, rows, keep), reverse=True)
        last_dC = mosaic_gradient_after_part(before, gates, last_dC, (qk_dim, v_dim), context_axis)
    run, states = functools.partial(run_pass, attend), ctx.states
    if states is None:
        alone = Inputs(None, k, v, rows, keep, init=initial_C)
        states = run(alone, Options(outputs=False, emit_states=True)).states
    partner_x = ctx.h if stabilize_correctly else None
    by_v = run(
        Inputs(k, q, dh, rows, keep, init=last_dC, partner_x=partner_x, partner_states=states),
        Options(reverse=True, emit_last=True, emit_scores=True),
    )
    if stabilize_correctly:
        # The gradient of the normalizer, times the normalizer.
        d_qn = -jnp.sign(ctx.qn) * jnp.sum(by_v.x_dots, axis=1) / norm
        bias = norm * jnp.where(jnp.abs(ctx.qn) > bound, bound_gradient(d_qn), 0)
        rows = rows.at[:, :, Row.BIAS].set(bias)
    read_q = weighted_sums(tokens, q, bias * gates.read / norm)
    if context_axis:
        _, before = carry_over(read_q, keep, jnp.zeros_like(last_dn), reverse=True)
        last_dn = mosaic_gradient_after_part(before, gates, last_dn, (qk_dim,), context_axis)
    after_dn, initial_dn = carry_over(read_q, keep, last_dn, reverse=True)
    by_q = run(
        Inputs(dh, v, k, rows, keep, _transpose(initial_C), ctx.before_n, partner=q), Options()
    )
    by_k = run(
        Inputs(
            *(v, dh, q, rows, keep, _transpose(last_dC), after_dn),
            partner=k,
            partner_scores=by_v.scores,
        ),
        Options(reverse=True, emit_crossings=True),
    )

    # The gates, by sums of the terms that span them alone; see `docs/mlstm.md`.
    through_q, through_k = jnp.sum(by_q.dots, axis=1), jnp.sum(by_k.dots, axis=1)
    overlaps = _complete_overlaps(by_v.overlaps, by_k.crossings, gates)
    overlaps += jnp.sum(ctx.before_n * after_dn, axis=-1)
    d_i, d_log_f = gradients_of_gates(
        by_k.pair_sums.reshape(through_k.shape),
        _sums_of_spanning_pairs(by_k.pairs).reshape(through_k.shape),
        through_q,
        through_k,
        keep * overlaps,
    )

    d_tokens = (
        tokens.unfold(dx, x.shape[-1]).astype(x.dtype)
        for dx, x in zip((by_q.out, by_k.out, by_v.out), arguments[:3], strict=True)
    )
    d_initial = by_v.last[:, :qk_dim, :v_dim], initial_dn[:, :qk_dim]
    if context_axis:
        d_initial = only_in_first_part(d_initial, context_axis)
    return *d_tokens, d_i, d_log_f, d_initial


def _sums_of_spanning_pairs(pairs: jax.Array) -> jax.Array:
    """Returns, for each token `r` of a chunk, the sum over its pairs with `s < r <= t`.

    One product, which reads the pairs once; that of `gates.sum_of_spanning_pairs` would be written.

    Args:
        pairs: Values `(N * NC, L, L)`, entry `[s, t]`.

    Returns:
        Sums `(N * NC, L)`, float32.
    """
    s, t, r = jnp.ogrid[:CHUNK, :CHUNK, :CHUNK]
    spans = ((s < r) & (r <= t)).astype(pairs.dtype).reshape(CHUNK**2, CHUNK)
    return jnp.dot(pairs.reshape(-1, CHUNK**2), spans, precision=_TWO_PARTS)


def _complete_overlaps(overlaps: jax.Array, crossings: jax.Array, gates: TokenGates) -> jax.Array:
    """Returns the products of the states before the chunks with their gradients after them.

    The state before a chunk without a state in memory is the decayed state before the chunk before
    it, and what the tokens of that chunk wrote.

    Args:
        overlaps: `Outputs.overlaps` of dv.
        crossings: `Outputs.crossings` of dk.
        gates: The gates.

    Returns:
        The products `(N, NC)`.
    """
    overlaps, crossings = jnp.sum(overlaps, axis=(1, 3)), jnp.sum(crossings, axis=1)
    num_chunks = overlaps.shape[1]
    written = jnp.sum(crossings * gates.write[:, ::2], axis=-1)
    keep = jnp.repeat(gates.keep[:, ::2], 2, axis=1)[:, :num_chunks]
    written = jnp.repeat(written, 2, axis=1)[:, :num_chunks]
    has_state = jnp.arange(num_chunks) % 2 == 0
    return jnp.where(has_state, overlaps, keep * overlaps + written)


def _transpose(state: jax.Array | None) -> jax.Array | None:
    return None if state is None else state.swapaxes(-1, -2)


def mlstm_mosaic(
    arguments: MLSTMArguments,
    reset: jax.Array | None,
    config: Any,
    context_axis: str | None = None,
    attend: Attend = decayed_attention_hopper,
) -> jax.Array | tuple[jax.Array, MLSTMState]:
    """Computes the mLSTM with the kernels, and its gradient.

    Args:
        arguments: Arguments of the backend; `q`, `k` and `v` are bfloat16 or float16.
        reset: See `mLSTMBackend.__call__`.
        config: Options of `fwbw`, of which `stabilize_correctly`, `keep_c` and `return_state` have
            an effect.
        context_axis: Mesh axis that the tokens are sharded over, or None, see `fwbw_forward`.
        attend: The implementation of `decayed_attention`.

    Returns:
        `h (..., T, DHV)`, or `(h, (C, n, m))` with `config.return_state`.
    """
    first_state = None
    if context_axis:
        # Outside of the function with its own gradient, where policies of remat see its name.
        constants = lax.stop_gradient(arguments)
        first_state = mosaic_state_before_part(constants, reset, context_axis, attend)
    return _mlstm_mosaic(arguments, first_state, reset, config, context_axis, attend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _mlstm_mosaic(arguments, first_state, reset, config, context_axis, attend):
    """Implements `mlstm_mosaic` with the state before this device's part, whose gradient is 0."""
    return _forward_rule(
        arguments, first_state, reset, config, context_axis, attend, keep_states=False
    )[0]


def _forward_rule(arguments, first_state, reset, config, context_axis, attend, keep_states=None):
    h, ctx = mosaic_forward(
        arguments,
        first_state,
        reset,
        stabilize_correctly=config.stabilize_correctly,
        keep_states=config.keep_c if keep_states is None else keep_states,
        return_state=config.return_state,
        attend=attend,
    )
    if not config.return_state:
        return h, ctx
    last = ctx.last_state
    return (h, of_last_part(last, context_axis) if context_axis else last), ctx


def _backward_rule(config, context_axis, attend, ctx, cotangents):
    dh, d_last = cotangents if config.return_state else (cotangents, None)
    grads = mosaic_backward(
        ctx,
        dh,
        d_last,
        stabilize_correctly=config.stabilize_correctly,
        context_axis=context_axis,
        attend=attend,
    )
    return grads, None, None


_mlstm_mosaic.defvjp(_forward_rule, _backward_rule, optimize_remat=True)
