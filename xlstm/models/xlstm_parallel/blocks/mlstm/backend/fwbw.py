"""The mLSTM in its chunkwise form, with a hand-written backward pass.

The sequence is split into `NC` chunks of `L` tokens. Within a chunk, all pairs of tokens are
weighted as in the parallel form; between chunks, the state `(C, n, m)` is passed on as in the
recurrent form. The work is linear in `T`, and no array has the size `T x T`. `docs/mlstm.md`
derives the backward pass, and `xlstm.common_types` describes the notation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.distributed.context_parallel import of_last_part
from xlstm.distributed.mesh import axis_size, varying_axes
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    chunk_gates,
    log_scales,
    merge_chunks,
    product,
    round_to,
    split_chunks,
    state_keep,
    unfold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    mLSTMBackend,
    mLSTMBackendConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    causal_forget_matrix,
    gradients_of_gates,
    pair_log_weights,
    rev_cumsum,
    rev_cumsum_off,
    sum_of_spanning_pairs,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    choose_implementation,
    current_device,
    default_chunk_size,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import (
    MLSTMArguments,
    MLSTMInputs,
    MLSTMState,
    check_reset,
    check_shape,
    prepare_inputs,
    state_product,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import normalizer_gradients
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.programs import (
    gradients_between_chunks,
    is_cpu,
    split_denominator,
    states_between_chunks,
    states_of,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.residuals import (
    FwbwContext,
    add_scale_gradients,
    inputs_of_part,
    recompute,
    split_tokens,
)

__all__ = [
    "FwbwContext",
    "causal_forget_matrix",
    "fwbw_backward",
    "fwbw_forward",
    "mLSTMBackendFwbw",
    "mLSTMBackendFwbwConfig",
    "mlstm_fwbw_custom_grad",
    "rev_cumsum",
    "rev_cumsum_off",
]


@dataclasses.dataclass(frozen=True)
class mLSTMBackendFwbwConfig(mLSTMBackendConfig):
    """Options of the `fwbw` backend.

    The backward pass recomputes what the forward pass does not keep in memory for it. Only
    `stabilize_correctly` changes results.
    """

    chunk_size: int | None = 512  # Number of tokens in a chunk, L; None for one chunk, -1 for
    # `default_chunk_size`.
    return_state: bool = False  # Whether the function returns the last state as well.
    use_initial_state: bool = False  # Whether to expect an initial state; a given one is used.
    keep_G: bool = False  # Keep the scores of all pairs in a chunk: T * L per head.
    keep_gates: bool = True  # Keep the sums of the gates within the chunks: about 4 * T per head.
    keep_M: bool = False  # Keep the log scales m of the tokens: T per head.
    keep_c: bool = False  # Keep the states between the chunks: T / L * DHQK * DHV per head.
    stabilize_correctly: bool = False  # Bound the normalizer by exp(-m) instead of 1.
    implementation: str = "auto"  # Program of `mlstm_fwbw_custom_grad`: auto, xla or mosaic.

    def __post_init__(self):
        if self.chunk_size is not None and self.chunk_size < 1 and self.chunk_size != -1:
            raise ValueError(f"chunk_size={self.chunk_size}: it must be at least 1, None or -1")


def fwbw_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    i: jax.Array,
    f: jax.Array,
    config: mLSTMBackendFwbwConfig,
    initial_C: jax.Array | None = None,
    initial_n: jax.Array | None = None,
    initial_m: jax.Array | None = None,
    reset: jax.Array | None = None,
    *,
    precision: lax.Precision | None = None,
    context_axis: str | None = None,
) -> tuple[jax.Array, FwbwContext]:
    """Runs the forward pass.

    Args:
        q: Queries `(..., T, DHQK)`.
        k: Keys `(..., T, DHQK)`.
        v: Values `(..., T, DHV)`.
        i: Input gate pre-activations `(..., T)` or `(..., T, 1)`.
        f: Forget gate pre-activations `(..., T)` or `(..., T, 1)`.
        config: Options of the backend.
        initial_C: Matrix memory before the first token `(..., DHQK, DHV)`; None for zero.
        initial_n: Normalizer `(..., DHQK)`; None for zero.
        initial_m: Log scale `(...)`; None for zero.
        reset: Bool, broadcasts to `(..., T)`: True drops the state before that token.
        precision: Precision of float32 products, see `product_precision`.
        context_axis: Mesh axis that the tokens are sharded over, in contiguous parts, or None. The
            initial state, before the first part, is the same on all of its devices.

    Returns:
        `h (..., T, DHV)` in the type of `v`, and the residuals for `fwbw_backward`.

    Raises:
        ValueError: If shapes or types are wrong, or the initial state is incomplete.
    """
    arguments = MLSTMArguments(q, k, v, i, f, initial_C, initial_n, initial_m)
    inputs = prepare_inputs(arguments)
    reset = check_reset(reset, inputs.i.shape)
    chunk_size = config.chunk_size
    if chunk_size == -1:
        chunk_size = default_chunk_size(current_device(), inputs.q.shape[-1], inputs.v.shape[-1])
    q, k, v = split_tokens(inputs, chunk_size)
    gates = chunk_gates(inputs.i, inputs.log_f, reset, chunk_size)
    is_zero = initial_C is None
    before, last, first = states_between_chunks(
        k, v, gates, inputs.state, is_zero, precision, context_axis
    )
    log_weights = pair_log_weights(gates.i, gates.log_f, gates.document)
    m = log_scales(log_weights, gates, before.m)

    multiply = functools.partial(product, precision=precision)
    weights = jnp.exp(log_weights - m[..., None])
    scores = multiply("nctk,ncsk->ncts", q, k) * weights
    carried_q = q * jnp.exp(gates.carry + before.m[..., None] - m)[..., None]
    qn = jnp.sum(scores, axis=-1) + jnp.sum(carried_q * before.n[..., None, :], axis=-1)
    early, late = split_denominator(qn, m, config.stabilize_correctly)
    carried_q, scores = (carried_q / early).astype(v.dtype), round_to(scores / early, v.dtype)
    # XLA on GPUs stores this sum in the type of `h`, without a pass of its own, in this order only.
    h = multiply("nctk,nckv->nctv", carried_q, before.C.astype(v.dtype))
    h = round_to((h + multiply("ncts,ncsv->nctv", scores, v)) / late, v.dtype)

    *leading, time = inputs.i.shape
    context = FwbwContext(
        arguments=arguments,
        reset=reset,
        h=h,
        qn=qn,
        first_state=first,
        last_state=unfold_state(last, leading),
        gates=gates if config.keep_gates else None,
        m=m if config.keep_M else None,
        weights=weights if config.keep_G and is_cpu() else None,
        scores=scores if config.keep_G else None,
        before=before if config.keep_c else None,
    )
    return merge_chunks(h, leading, time).astype(arguments.v.dtype), context


def fwbw_backward(
    ctx: FwbwContext,
    dh: jax.Array,
    config: mLSTMBackendFwbwConfig,
    dc_last: jax.Array | None = None,
    dn_last: jax.Array | None = None,
    dm_last: jax.Array | None = None,
    *,
    precision: lax.Precision | None = None,
    context_axis: str | None = None,
) -> tuple[jax.Array, ...]:
    """Runs the backward pass.

    With `stabilize_correctly` it computes the exact gradient. Without, the denominator and `m` are
    constants of the gradient, which is exact if a scale-invariant norm follows.

    Args:
        ctx: Residuals that `fwbw_forward` returned for the same `config`.
        dh: Gradient of the output `(..., T, DHV)`.
        config: Options of the backend.
        dc_last: Gradient of the last `C (..., DHQK, DHV)`; None for zero.
        dn_last: Gradient of the last `n (..., DHQK)`; None for zero.
        dm_last: Gradient of the last `m (...)`; None for zero.
        precision: Precision of float32 products, see `product_precision`.
        context_axis: See `fwbw_forward`. The gradients of the last state are summed over it.

    Returns:
        The gradients of `q, k, v, i, f` and of the initial `C, n, m`, in the shapes and types of
        the arguments, or of the zero state if no initial state was given. With `context_axis`,
        those of the initial state are zero except in the first part.

    Raises:
        ValueError: If shapes are wrong.
    """
    check_shape("dh", dh, ctx.arguments.v.shape)
    for name, dx, x in zip("cnm", (dc_last, dn_last, dm_last), ctx.last_state, strict=True):
        if dx is not None:
            check_shape(f"d{name}_last", dx, x.shape)
    d_last = MLSTMState(
        *(
            jnp.zeros_like(x) if dx is None else dx.astype(x.dtype)
            for x, dx in zip(ctx.last_state, (dc_last, dn_last, dm_last), strict=True)
        )
    )
    has_d_last = any(dx is not None for dx in (dc_last, dn_last, dm_last))
    if has_d_last and context_axis:
        d_last = lax.psum(d_last, context_axis)
    # Before the barrier, in which arguments that `shard_map` replicates lose that property.
    _, pull_back = jax.vjp(prepare_inputs, ctx.arguments)
    # Without the barrier the compiler would merge the recomputation with the forward pass, and keep
    # its results, or run it long before the gradient is available.
    ctx, dh, d_last = lax.optimization_barrier((ctx, dh, d_last))
    inputs = prepare_inputs(ctx.arguments)
    inputs = inputs_of_part(inputs, ctx.first_state)
    d_inputs = _gradient_of_inputs(
        ctx, inputs, dh, d_last, has_d_last, config, precision, context_axis
    )
    (d_arguments,) = pull_back(d_inputs)
    if ctx.arguments.initial_C is None:
        return *d_arguments[:5], *d_inputs.state
    return tuple(d_arguments)


def _gradient_of_inputs(
    ctx: FwbwContext,
    inputs: MLSTMInputs,
    dh: jax.Array,
    d_last: MLSTMState,
    has_d_last: bool,
    config: mLSTMBackendFwbwConfig,
    precision: lax.Precision | None,
    context_axis: str | None,
) -> MLSTMInputs:
    """Returns the gradients of the prepared inputs; see `fwbw_backward`."""
    states = states_of(is_zero=ctx.arguments.initial_C is None and context_axis is None)
    q, k, v, gates, before, m = recompute(ctx, inputs, states, precision)
    dtype, (*leading, time) = v.dtype, inputs.i.shape
    multiply = functools.partial(product, precision=precision)
    # `d_qn` is the gradient of the normalizer times `early`, and `dh` that of `h` over `late`.
    early, late = split_denominator(ctx.qn, m, config.stabilize_correctly)
    dh = split_chunks(dh, len(leading), ctx.chunk_size).astype(m.dtype)
    _, d_qn = normalizer_gradients(dh, ctx.h, ctx.qn, m, config.stabilize_correctly)
    d_qn, dh = d_qn[..., None] * early, (dh / late).astype(dtype)

    # Weights: of the state before the chunk in its tokens (`carry`), and of the tokens in the state
    # after it (`write`).
    m_of_states = jnp.concatenate([before.m, ctx.last_state.m.reshape(-1, 1)], axis=1)
    carry = jnp.exp(gates.carry + before.m[..., None] - m)[..., None] / early
    write = jnp.exp(gates.write - m_of_states[:, 1:, None])[..., None]

    # Gradients through the states.
    (d_C, d_n), d_initial = gradients_between_chunks(
        (q * carry, dh, d_qn), gates, m_of_states, d_last, has_d_last, precision, context_axis
    )
    d_initial = unfold_state(MLSTMState(*d_initial, jnp.zeros_like(d_last.m.reshape(-1))), leading)
    dq_carry = carry * (
        multiply("nctv,nckv->nctk", dh, before.C.astype(dtype)) + d_qn * before.n[..., None, :]
    )
    dk_write = write * (multiply("ncsv,nckv->ncsk", v, d_C.astype(dtype)) + d_n[..., None, :])
    # A CPU scales the product in the addition below; a GPU would store the product once more.
    of_k, of_product = (1.0, write) if is_cpu() else (write, 1.0)
    dv = of_product * multiply("ncsk,nckv->ncsv", (k * of_k).astype(dtype), d_C.astype(dtype))

    # Gradients through the pairs within the chunk.
    weights, scores = ctx.weights, ctx.scores
    if weights is None:
        log_weights = pair_log_weights(gates.i, gates.log_f, gates.document)
        weights = jnp.exp(log_weights - m[..., None]) / early
    if scores is None:
        scores = round_to(multiply("nctk,ncsk->ncts", q, k) * weights, dtype)
    d_scores = multiply("nctv,ncsv->ncts", dh, v) + d_qn
    d_products = round_to(d_scores * weights, dtype)
    dq = multiply("ncts,ncsk->nctk", d_products, k) + dq_carry
    dk = multiply("ncts,nctk->ncsk", d_products, q) + dk_write
    dv += multiply("ncts,nctv->ncsv", scores, dh)

    keep = state_keep(gates, m_of_states)
    through_states = keep * state_product(before, MLSTMState(d_C, d_n, before.m))
    d_pairs = d_scores * scores
    d_i, d_log_f = gradients_of_gates(
        jnp.sum(d_pairs, axis=-2),
        sum_of_spanning_pairs(d_pairs),
        jnp.sum(q * dq_carry, axis=-1),
        jnp.sum(k * dk_write, axis=-1),
        through_states,
    )
    d_i, d_log_f = merge_chunks(d_i, leading, time), merge_chunks(d_log_f, leading, time)
    if ctx.reset is not None:
        d_log_f = jnp.where(ctx.reset, 0, d_log_f)

    d_tokens = (
        merge_chunks(dx, leading, time).astype(x.dtype)
        for dx, x in zip((dq, dk, dv), inputs[:3], strict=True)
    )
    gradients = MLSTMInputs(*d_tokens, d_i, d_log_f, d_initial)
    if not config.stabilize_correctly:
        return gradients
    last = ctx.last_state, d_last if has_d_last else None
    return add_scale_gradients(inputs, gradients, ctx.reset, *last, context_axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fwbw(
    arguments: MLSTMArguments,
    reset: jax.Array | None,
    config: mLSTMBackendFwbwConfig,
    precision: lax.Precision | None,
    context_axis: str | None,
) -> jax.Array | tuple[jax.Array, MLSTMState]:
    """Implements the function that `mlstm_fwbw_custom_grad` returns, without its gradient."""
    return _fwbw_forward_rule(arguments, reset, config, precision, context_axis)[0]


def _fwbw_forward_rule(arguments, reset, config, precision, context_axis):
    h, ctx = fwbw_forward(
        *arguments[:5],
        config,
        *arguments[5:],
        reset,
        precision=precision,
        context_axis=context_axis,
    )
    if not config.return_state:
        return h, ctx
    last = ctx.last_state
    return (h, of_last_part(last, context_axis) if context_axis else last), ctx


def _fwbw_backward_rule(config, precision, context_axis, ctx, cotangents):
    dh, d_last = cotangents if config.return_state else (cotangents, (None, None, None))
    grads = fwbw_backward(ctx, dh, config, *d_last, precision=precision, context_axis=context_axis)
    given = [x is not None for x in ctx.arguments]
    grads = (dx if is_given else None for dx, is_given in zip(grads, given, strict=True))
    return MLSTMArguments(*grads), None


_fwbw.defvjp(_fwbw_forward_rule, _fwbw_backward_rule)


def mlstm_fwbw_custom_grad(
    config: mLSTMBackendFwbwConfig,
    precision: lax.Precision | None = None,
    context_axis: str | None = None,
):
    """Creates the chunkwise mLSTM function with its hand-written gradient.

    Args:
        config: Options of the backend.
        precision: Precision of float32 products, see `product_precision`.
        context_axis: Mesh axis that the tokens are sharded over in `shard_map`, see `fwbw_forward`;
            None if they are not. It needs `check_vma=False`.

    Returns:
        A function of `(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None)`,
        with the shapes of `fwbw_forward`, that returns `h (..., T, DHV)`, or `(h, (C, n, m))` with
        `config.return_state`. It raises a `ValueError` if shapes or types are wrong, the initial
        state is incomplete, or `shard_map` checks the axes over which sharded tokens vary.
    """

    def mlstm_fwbw(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None):
        arguments = MLSTMArguments(q, k, v, i, f, initial_C, initial_n, initial_m)
        axis = context_axis if context_axis and axis_size(context_axis) > 1 else None
        if axis in varying_axes(arguments):
            raise ValueError(
                f"tokens that are sharded over {axis} need jax.shard_map(check_vma=False)"
            )
        dtype, dims = jnp.result_type(q, k, v), (q.shape[-1], v.shape[-1])
        chosen = choose_implementation(config.implementation, current_device(), dtype, *dims)
        if chosen.name == "xla":
            return _fwbw(arguments, reset, config, precision, axis)
        # Imported only where it is used: not every jaxlib has Mosaic GPU.
        from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import mlstm_mosaic

        return mlstm_mosaic(arguments, reset, config, axis)

    return mlstm_fwbw


class mLSTMBackendFwbw(mLSTMBackend):
    """Backend `fwbw`: chunkwise, linear in `T`, the default for training."""

    config: mLSTMBackendFwbwConfig
    config_class = mLSTMBackendFwbwConfig
    can_shard_tokens = True

    def run(self, arguments, reset, return_last_states):
        """See `mLSTMBackend.run`."""
        config = dataclasses.replace(self.config, return_state=return_last_states)
        mlstm_fwbw = mlstm_fwbw_custom_grad(config, self.precision, self.context_axis)
        return mlstm_fwbw(*arguments, reset=reset)
