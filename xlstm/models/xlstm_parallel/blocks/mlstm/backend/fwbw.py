"""The mLSTM in its chunkwise form, with a hand-written backward pass.

The sequence is split into `NC` chunks of `L` tokens. Within a chunk, all pairs of tokens are
weighted as in the parallel form; between chunks, the state `(C, n, m)` is passed on as in the
recurrent form. The work is linear in `T`, and no array has the size `T x T`. `docs/mlstm.md`
derives the backward pass, and `xlstm.common_types` describes the notation.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    chunk_gates,
    chunk_state_gradients,
    chunk_states,
    chunk_states_by_decays,
    fold_state,
    log_scales,
    merge_chunks,
    product,
    split_chunks,
    unfold_state,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import (
    mLSTMBackend,
    mLSTMBackendConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    causal_forget_matrix,
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
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.normalizer import (
    divide_by_normalizer,
    normalizer_gradients,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.residuals import (
    FwbwContext,
    add_scale_gradients,
    recompute,
    split_tokens,
    weigh_pairs,
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
    keep_G: bool = False  # Keep weights and scores of all pairs in a chunk: 2 * T * L per head.
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

    Returns:
        `h (..., T, DHV)` in the type of `v`, and the residuals for `fwbw_backward`.

    Raises:
        ValueError: If shapes or types are wrong, or the initial state is incomplete.
    """
    arguments = MLSTMArguments(q, k, v, i, f, initial_C, initial_n, initial_m)
    return _forward(arguments, reset, config, precision, chunk_states)


def _forward(
    arguments: MLSTMArguments,
    reset: jax.Array | None,
    config: mLSTMBackendFwbwConfig,
    precision: lax.Precision | None,
    compute_states: Callable[..., tuple[MLSTMState, MLSTMState]],
) -> tuple[jax.Array, FwbwContext]:
    """Implements `fwbw_forward`; `compute_states` is `chunk_states`, or does the same."""
    inputs = prepare_inputs(arguments)
    reset = check_reset(reset, inputs.i.shape)
    chunk_size = config.chunk_size
    if chunk_size == -1:
        chunk_size = default_chunk_size(current_device(), inputs.q.shape[-1], inputs.v.shape[-1])
    q, k, v = split_tokens(inputs, chunk_size)
    gates = chunk_gates(inputs.i, inputs.log_f, reset, chunk_size)
    before, last = compute_states(k, v, gates, fold_state(inputs.state), precision)
    log_weights = pair_log_weights(gates.i, gates.log_f, gates.document)
    m = log_scales(log_weights, gates, before.m)

    multiply = functools.partial(product, precision=precision)
    pairs = _, scores = weigh_pairs(q, k, log_weights, m, precision)
    carried_q = q * jnp.exp(gates.carry + before.m[..., None] - m)[..., None]
    numerator = multiply("ncts,ncsv->nctv", scores.astype(v.dtype), v)
    numerator += multiply("nctk,nckv->nctv", carried_q.astype(q.dtype), before.C.astype(q.dtype))
    qn = jnp.sum(scores, axis=-1) + jnp.sum(carried_q * before.n[..., None, :], axis=-1)
    h = divide_by_normalizer(numerator, qn, m, config.stabilize_correctly)

    *leading, time = inputs.i.shape
    context = FwbwContext(
        arguments=arguments,
        reset=reset,
        h=h,
        qn=qn,
        last_state=unfold_state(last, leading),
        gates=gates if config.keep_gates else None,
        m=m if config.keep_M else None,
        pairs=pairs if config.keep_G else None,
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

    Returns:
        The gradients of `q, k, v, i, f` and of the initial `C, n, m`, in the shapes and types of
        the arguments, or of the zero state if no initial state was given.

    Raises:
        ValueError: If shapes are wrong.
    """
    inputs, pull_back = jax.vjp(prepare_inputs, ctx.arguments)
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
    # Without the barrier the compiler would merge the recomputation with the forward pass, and keep
    # its results, or run it long before the gradient is available.
    ctx, inputs, dh, d_last = lax.optimization_barrier((ctx, inputs, dh, d_last))
    d_inputs = _gradient_of_inputs(ctx, inputs, dh, d_last, has_d_last, config, precision)
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
) -> MLSTMInputs:
    """Returns the gradients of the prepared inputs; see `fwbw_backward`."""
    q, k, v, gates, before, m, weights, scores = recompute(ctx, inputs, precision)
    dtype, (*leading, time) = v.dtype, inputs.i.shape
    multiply = functools.partial(product, precision=precision)
    dh = split_chunks(dh, len(leading), ctx.chunk_size).astype(ctx.h.dtype)
    d_numerator, d_qn = normalizer_gradients(dh, ctx.h, ctx.qn, m, config.stabilize_correctly)
    d_numerator = d_numerator.astype(dtype)

    # Weights: of the state before the chunk in its tokens (`carry`), of the tokens in the state
    # after it (`write`), and of the state before the chunk in the state after it (`keep`).
    after_m = jnp.concatenate([before.m[:, 1:], ctx.last_state.m.reshape(-1, 1)], axis=1)
    log_carry = gates.carry + before.m[..., None]
    carry = jnp.exp(log_carry - m)[..., None]
    write = jnp.exp(gates.write - after_m[..., None])[..., None]
    keep = jnp.exp(log_carry[..., -1] - after_m)

    # Gradients through the states.
    carried_q = q * carry
    (d_C, d_n), d_initial = chunk_state_gradients(
        carried_q.astype(dtype),
        d_numerator,
        jnp.sum(carried_q * d_qn[..., None], axis=-2),
        keep,
        fold_state(d_last)[:2],
        precision,
    )
    d_initial = unfold_state(MLSTMState(*d_initial, jnp.zeros_like(d_last.m.reshape(-1))), leading)
    dq_carry = carry * (
        multiply("nctv,nckv->nctk", d_numerator, before.C.astype(dtype))
        + d_qn[..., None] * before.n[..., None, :]
    )
    dk_write = write * (multiply("ncsv,nckv->ncsk", v, d_C.astype(dtype)) + d_n[..., None, :])
    dv = write * multiply("ncsk,nckv->ncsv", k, d_C.astype(dtype))

    # Gradients through the pairs within the chunk.
    d_scores = multiply("nctv,ncsv->ncts", d_numerator, v) + d_qn[..., None]
    d_pairs = d_scores * scores
    d_products = (d_scores * weights).astype(dtype)
    dq = multiply("ncts,ncsk->nctk", d_products, k) + dq_carry
    dk = multiply("ncts,nctk->ncsk", d_products, q) + dk_write
    dv += multiply("ncts,nctv->ncsv", scores.astype(dtype), d_numerator)

    # Gradients of the gates. They are sums of the terms that span a forget gate, never differences
    # of sums: with nearly closed gates these terms are tiny, and a float32 difference is noise.
    q_carry, k_write = jnp.sum(q * dq_carry, axis=-1), jnp.sum(k * dk_write, axis=-1)
    d_i = jnp.sum(d_pairs, axis=-2) + k_write
    d_log_f = sum_of_spanning_pairs(d_pairs)
    d_log_f += rev_cumsum(q_carry) + rev_cumsum_off(k_write[..., ::-1])[..., ::-1]
    d_log_f += (keep * state_product(before, MLSTMState(d_C, d_n, before.m)))[..., None]
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
    return add_scale_gradients(inputs, gradients, ctx.reset, *last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fwbw(
    arguments: MLSTMArguments,
    reset: jax.Array | None,
    config: mLSTMBackendFwbwConfig,
    precision: lax.Precision | None,
) -> jax.Array | tuple[jax.Array, MLSTMState]:
    """Implements the function that `mlstm_fwbw_custom_grad` returns, without its gradient."""
    # On an H100 the decays are the faster way forward, but the slower one with a backward pass.
    by_decays = current_device().platform != "cpu"
    compute_states = chunk_states_by_decays if by_decays else chunk_states
    h, ctx = _forward(arguments, reset, config, precision, compute_states)
    return (h, ctx.last_state) if config.return_state else h


def _fwbw_forward_rule(arguments, reset, config, precision):
    h, ctx = _forward(arguments, reset, config, precision, chunk_states)
    return ((h, ctx.last_state) if config.return_state else h), ctx


def _fwbw_backward_rule(config, precision, ctx, cotangents):
    dh, d_last = cotangents if config.return_state else (cotangents, (None, None, None))
    grads = fwbw_backward(ctx, dh, config, *d_last, precision=precision)
    given = [x is not None for x in ctx.arguments]
    grads = (dx if is_given else None for dx, is_given in zip(grads, given, strict=True))
    return MLSTMArguments(*grads), None


_fwbw.defvjp(_fwbw_forward_rule, _fwbw_backward_rule)


def mlstm_fwbw_custom_grad(config: mLSTMBackendFwbwConfig, precision: lax.Precision | None = None):
    """Creates the chunkwise mLSTM function with its hand-written gradient.

    Args:
        config: Options of the backend.
        precision: Precision of float32 products, see `product_precision`.

    Returns:
        A function of `(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None)`,
        with the shapes of `fwbw_forward`, that returns `h (..., T, DHV)`, or `(h, (C, n, m))` with
        `config.return_state`.
    """

    def mlstm_fwbw(q, k, v, i, f, initial_C=None, initial_n=None, initial_m=None, reset=None):
        arguments = MLSTMArguments(q, k, v, i, f, initial_C, initial_n, initial_m)
        dtype, dims = jnp.result_type(q, k, v), (q.shape[-1], v.shape[-1])
        chosen = choose_implementation(config.implementation, current_device(), dtype, *dims)
        if chosen.name == "xla":
            return _fwbw(arguments, reset, config, precision)
        # Imported only where it is used: not every jaxlib has Mosaic GPU.
        from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import mlstm_mosaic

        return mlstm_mosaic(arguments, reset, config)

    return mlstm_fwbw


class mLSTMBackendFwbw(mLSTMBackend):
    """Backend `fwbw`: chunkwise, linear in `T`, the default for training."""

    config: mLSTMBackendFwbwConfig
    config_class = mLSTMBackendFwbwConfig

    def run(self, arguments, reset, return_last_states):
        """See `mLSTMBackend.run`."""
        config = dataclasses.replace(self.config, return_state=return_last_states)
        return mlstm_fwbw_custom_grad(config, self.precision)(*arguments, reset=reset)
