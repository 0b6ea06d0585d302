"""Decayed causal attention, the one operation behind all passes of the chunkwise mLSTM.

Token `s` writes into later tokens `t`, which read it with the weight

    W_ts = exp(coarse_t - coarse_s + reader_t + writer_s)    for s <= t in the same document

within a chunk of `L` tokens, and through a state from chunk to chunk. With rows `r`, columns `c`,

    out_r = sum_c (a_r . b_c) W x_c,     state = sum_c w_c b_c x_c^T

where rows read and columns write or, if `reverse`, rows write and columns read, and the state
passes from the last chunk to the first. Roles of the arrays in each pass of the mLSTM:

    pass      a    b    x
    forward   q    k    v
    dv        k    q    dh   reverse
    dq        dh   v    k
    dk        v    dh   q    reverse

This module has the operation in XLA, with the roundings of the kernels in `hopper`, which take the
same arguments; `docs/gpu.md` explains both.
"""

import dataclasses
import enum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import MOSAIC_CHUNK_SIZE

CHUNK = MOSAIC_CHUNK_SIZE
# Larger log weights come only from rounding of huge gates; exp() of this is finite in bfloat16.
LARGEST_LOG_WEIGHT = 60.0


class Row(enum.IntEnum):
    """Rows of `Inputs.gates`, where they are described."""

    COARSE = 0
    READER = 1
    WRITER = 2
    FIRST = 3
    READ = 4
    WRITE = 5
    BIAS = 6  # These two in the backward pass ...
    LAST = 7
    CARRIED = 6  # ... and these in the forward pass.
    BOUND = 7


@dataclasses.dataclass(frozen=True)
class Options:
    """What a pass computes besides the output.

    Attributes:
        reverse: Whether rows write and columns read, from the last chunk to the first.
        outputs: Whether to compute the output; False for states alone, where `a` is not read.
        normalize: Whether to divide the output by the normalizer: the sum of a row's scores plus
            `CARRIED`, but at least `BOUND`.
        emit_states: Whether to return the state before every second chunk; not if `reverse`.
        emit_last: Whether to return the state after the last chunk.
        emit_scores: Whether to return the weighted scores of the pairs in each chunk.
        emit_crossings: Whether to read, in every second chunk, the state of the chunk after it too;
            only with `reverse` and a partner.
        segments: Number of segments of the sequence, each of which starts from its own `init`. With
            more than one, the chunks of a segment are even in number.
    """

    reverse: bool = False
    outputs: bool = True
    normalize: bool = False
    emit_states: bool = False
    emit_last: bool = False
    emit_scores: bool = False
    emit_crossings: bool = False
    segments: int = 1


class Inputs(NamedTuple):
    """Inputs of a pass. `N = B * NH` sequences and heads, `NC` chunks of `L = 64` tokens.

    Attributes:
        a: `(B, T, NH * D)`, or None without outputs.
        b: `(B, T, NH * D)`.
        x: `(B, T, NH * E)`.
        gates: Numbers for each token `(N, NC, 8, L)`, float32. The rows are: the exact part of the
            sums of log forget gates in the chunk; the rest of the log weight of readers, and of
            writers; the first token of the chunk that a reader reads; the weights of the state
            before the chunk in a reader, and of a writer in the state after it; and, in the forward
            pass, the normalizer through the state and its bound, or, in the backward pass, the bias
            of readers and the last token of the chunk that reads a writer.
        keep: Factor of the state over each chunk `(N, NC)`, float32.
        init: State before the first chunk of each segment `(N * segments, D, E)`, float32; None for
            zero.
        vector: `(N, NC, E)`, float32: `a` and `b` have one feature more, which is `BIAS` for the
            readers and 1 for the writers, and this is its row of the state before the chunk. None
            for no such feature.
        partner: `(B, T, NH * E)`, to be multiplied by the output through the state; or None.
        partner_x: `(B, T, NH * E)`, to be multiplied by `x`; or None.
        partner_scores: `(N * NC, L, L)`, float32, to be multiplied by the unweighted scores; or
            None.
        partner_states: `(N * NS, D, E)`, each to be multiplied by the state before both of its
            chunks; or None. `NS` is `NC / 2`, rounded up.
    """

    a: jax.Array | None
    b: jax.Array
    x: jax.Array
    gates: jax.Array
    keep: jax.Array
    init: jax.Array | None = None
    vector: jax.Array | None = None
    partner: jax.Array | None = None
    partner_x: jax.Array | None = None
    partner_scores: jax.Array | None = None
    partner_states: jax.Array | None = None


class Outputs(NamedTuple):
    """Results of a pass; None for those that it does not compute.

    Attributes:
        out: `(B, T, NH * E)`, in the type of `x`.
        normalizer: With `normalize`, `(N, NC, L)`, float32.
        states: With `emit_states`, those before the chunks 0, 2, 4, ..., `(N * NS, D, E)`, in the
            type of `x`.
        last: With `emit_last`, the state after each segment, `(N * segments, D, E)`, float32.
        scores: With `emit_scores`, rows by columns, `(N * NC, L, L)`, float32.
        dots: With `partner`, the sums over the features of `partner` times the output through the
            state, before it is rounded, in parts that remain to be added, `(N, parts, NC, L)`.
        x_dots: With `partner_x`, the sums over the features of it times `x`, in parts, likewise.
        crossings: With `emit_crossings`, for the chunks `c` = 0, 2, 4, ..., the sums over the
            features of `partner` times `a` times the state before chunk `c + 1` in the direction of
            the pass, without weights and `vector`, in parts, `(N, parts, NS, L)`, float32. The last
            one is undefined if `NC` is odd.
        pairs: With `partner_scores`, the scores `a b^T`, with bias but without weights, times them,
            `(N * NC, L, L)`, float32.
        pair_sums: With `partner_scores`, the sums of the rows of `pairs`, float32, `(N, NC, L)`.
        overlaps: With `partner_states`, their products with the state, in parts that remain to be
            added, `(N, parts, NC, L)`, float32.
    """

    out: jax.Array | None = None
    normalizer: jax.Array | None = None
    states: jax.Array | None = None
    last: jax.Array | None = None
    scores: jax.Array | None = None
    dots: jax.Array | None = None
    x_dots: jax.Array | None = None
    crossings: jax.Array | None = None
    pairs: jax.Array | None = None
    pair_sums: jax.Array | None = None
    overlaps: jax.Array | None = None


def decayed_attention_xla(inputs: Inputs, options: Options) -> Outputs:
    """Computes a pass in XLA.

    Args:
        inputs: The inputs.
        options: What to compute.

    Returns:
        The outputs.
    """
    batch, time, _ = inputs.b.shape
    n, nc, _, size = inputs.gates.shape
    heads, dtype, reverse = n // batch, inputs.x.dtype, options.reverse

    def chunks(y: jax.Array) -> jax.Array:  # (B, T, NH * D) -> (N, NC, L, D)
        return (
            y.reshape(batch, nc, size, heads, -1).transpose(0, 3, 1, 2, 4).reshape(n, nc, size, -1)
        )

    def product(spec: str, *operands: jax.Array) -> jax.Array:
        return jnp.einsum(spec, *operands, preferred_element_type=jnp.float32)

    b, x = chunks(inputs.b), chunks(inputs.x)
    # Weights of rows in the output through the state, and of columns in the state.
    from_state, to_state = Row.READ, Row.WRITE
    if reverse:
        from_state, to_state = Row.WRITE, Row.READ
    gates = [inputs.gates[:, :, row, :] for row in range(8)]
    weighted_x = (x * gates[to_state][..., None]).astype(dtype)
    states, last = _scan_states(b, weighted_x, inputs, options, product)
    results = {
        "states": states[:, ::2].astype(dtype).reshape(-1, *states.shape[2:])
        if options.emit_states
        else None,
        "last": last.reshape(-1, *last.shape[2:]) if options.emit_last else None,
    }
    if inputs.partner_states is not None:
        partner_states = inputs.partner_states.reshape(n, -1, *states.shape[2:])
        overlaps = states * jnp.repeat(partner_states, 2, axis=1)[:, :nc]
        parts = jnp.sum(overlaps, axis=-1).reshape(n, nc, -1, size)
        results["overlaps"] = jnp.sum(parts, axis=2)[:, None]
    if not options.outputs:
        return Outputs(**results)

    a = chunks(inputs.a)
    scores = product("ncrd,nczd->ncrz", a, b)
    readers_bias = gates[Row.BIAS]
    if inputs.vector is not None:
        scores += readers_bias[:, :, None, :] if reverse else readers_bias[..., None]
    if inputs.partner_scores is not None:
        pairs = scores * inputs.partner_scores.reshape(scores.shape)
        results["pair_sums"] = jnp.sum(pairs, axis=-1).reshape(n * nc, size)
        results["pairs"] = pairs.reshape(n * nc, size, size)
    if inputs.partner_x is not None:
        products = chunks(inputs.partner_x).astype(jnp.float32) * x
        results["x_dots"] = jnp.sum(products, axis=-1)[:, None]
    weighted = scores * pair_weights(inputs.gates, reverse)
    if options.emit_scores:
        results["scores"] = weighted.reshape(n * nc, size, size)
    through_state = product("ncrd,ncde->ncre", a, states.astype(dtype))
    if inputs.vector is not None:
        row_feature = jnp.ones_like(readers_bias) if reverse else readers_bias
        through_state += row_feature[..., None] * inputs.vector[:, :, None]
    through_state *= gates[from_state][..., None]
    if inputs.partner is not None:
        dots = jnp.sum(chunks(inputs.partner) * through_state, axis=-1)
        results["dots"] = dots[:, None]
    if options.emit_crossings:
        after = jnp.pad(states[:, 1::2], ((0, 0), (0, nc % 2), (0, 0), (0, 0)))
        read = product("ncrd,ncde->ncre", a[:, ::2], after.astype(dtype))
        crossings = jnp.sum(chunks(inputs.partner)[:, ::2] * read, axis=-1)
        results["crossings"] = crossings[:, None]
    out = through_state + product("ncrz,ncze->ncre", weighted.astype(dtype), x)
    if options.normalize:
        normalizer = jnp.sum(weighted, axis=-1) + gates[Row.CARRIED]
        results["normalizer"] = normalizer
        out /= jnp.maximum(jnp.abs(normalizer), gates[Row.BOUND])[..., None]
    out = out.reshape(batch, heads, time, -1).swapaxes(1, 2).reshape(batch, time, -1)
    return Outputs(out=out.astype(dtype), **results)


def pair_weights(gates: jax.Array, reverse: bool) -> jax.Array:
    """Returns the weights of the pairs in each chunk.

    Args:
        gates: `(N, NC, 8, L)`, see `Inputs`.
        reverse: Whether rows write and columns read.

    Returns:
        The weights, rows by columns, `(N, NC, L, L)`.
    """
    coarse, reader, writer = (gates[:, :, row] for row in (Row.COARSE, Row.READER, Row.WRITER))
    index = jnp.arange(gates.shape[-1])
    log_weights = coarse[..., :, None] - coarse[..., None, :]
    if reverse:
        log_weights = -log_weights + (writer[..., :, None] + reader[..., None, :])
        limit = gates[:, :, Row.LAST, :, None]
        mask = (index >= index[:, None]) & (index <= limit)
    else:
        log_weights += reader[..., :, None] + writer[..., None, :]
        limit = gates[:, :, Row.FIRST, :, None]
        mask = (index <= index[:, None]) & (index >= limit)
    return jnp.where(mask, jnp.exp(jnp.minimum(log_weights, LARGEST_LOG_WEIGHT)), 0)


def _scan_states(b, weighted_x, inputs, options, product):
    """Returns the state before every chunk `(N, NC, D, E)`, and after each segment."""
    n, nc, _, dim = b.shape
    segments = options.segments

    def split(y):
        return y.reshape(n, segments, nc // segments, *y.shape[2:])

    def step(state, xs):
        b, x, keep = xs
        added = product("nlsd,nlse->nlde", b, x)
        return keep[..., None, None] * state + added, state

    first = jnp.zeros((n, segments, dim, weighted_x.shape[-1]), jnp.float32)
    if inputs.init is not None:
        first = inputs.init.reshape(first.shape)
    xs = jax.tree.map(lambda y: jnp.moveaxis(split(y), 2, 0), (b, weighted_x, inputs.keep))
    last, states = lax.scan(step, first, xs, reverse=options.reverse)
    return jnp.moveaxis(states, 0, 2).reshape(n, nc, *first.shape[2:]), last
