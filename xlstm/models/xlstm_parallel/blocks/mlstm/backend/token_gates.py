"""The tokens and gates of the mLSTM as the kernels take them, and vectors between the chunks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.chunks import (
    PADDING_GATE,
    ChunkGates,
    chunk_gates,
    log_scales,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import CHUNK
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.gates import (
    document_starts,
    exact_and_small_sums,
    pair_log_weights,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMInputs

FEATURES = 64  # The heads' sizes are padded to multiples of this.


class Tokens(NamedTuple):
    """How arrays `(..., T, D)` become the kernels' `(B, T, NH * D)`, padded.

    The last leading axis is taken for the heads. In a layer, the transposition undoes the layer's
    own, and no copy remains.

    Attributes:
        leading: The leading axes.
        time: `T`.
    """

    leading: tuple[int, ...]
    time: int

    @property
    def heads(self) -> int:
        """NH; 1 with less than two leading axes."""
        return self.leading[-1] if len(self.leading) > 1 else 1

    @property
    def padding(self) -> int:
        """The number of tokens to add."""
        return -self.time % CHUNK

    def fold(self, x: jax.Array) -> jax.Array:
        """Returns `x (..., T, D)` as bfloat16 `(B, T, NH * D)`."""
        x = x.reshape(-1, self.heads, *x.shape[-2:]).swapaxes(1, 2)
        widths = (0, 0), (0, self.padding), (0, 0), (0, -x.shape[-1] % FEATURES)
        x = jnp.pad(x.astype(jnp.bfloat16), widths)
        return x.reshape(*x.shape[:2], -1)

    def unfold(self, x: jax.Array, dim: int) -> jax.Array:
        """Inverts `fold`; `dim` is the number of features."""
        x = x.reshape(*x.shape[:2], self.heads, -1)[:, : self.time, :, :dim].swapaxes(1, 2)
        return x.reshape(*self.leading, self.time, dim)

    def chunks(self, x: jax.Array) -> jax.Array:
        """Returns `x (B, T, NH)` as `(N, NC, L)`."""
        return x.swapaxes(1, 2).reshape(x.shape[0] * self.heads, -1, CHUNK)

    def tokens(self, x: jax.Array) -> jax.Array:
        """Returns `x (N, NC, L or 1, D or 1)` as `(B, NC, L or 1, NH, D or 1)`."""
        x = x.reshape(-1, self.heads, *x.shape[1:])
        return x.transpose(0, 2, 3, 1, 4)


class TokenGates(NamedTuple):
    """What the gates say about each token and chunk, float32; `N` sequences and heads.

    Attributes:
        chunk: The gates in chunks.
        coarse: Sums of the log forget gates in the chunk, without rounding errors `(N, NC, L)`.
        fine: The small rest of the sums.
        m: Log scale of every token `(N, NC, L)`.
        before_m: Log scale before every chunk `(N, NC)`.
        last_m: Log scale after the last chunk `(N,)`.
        read: Weight of the state before the chunk in a token, over `sqrt(DHQK)`, `(N, NC, L)`.
        write: Weight of a token in the state after the chunk `(N, NC, L)`.
        keep: Factor of the state over each chunk `(N, NC)`.
        first: First token of the chunk in the document of each token `(N, NC, L)`.
        last: Last one.
    """

    chunk: ChunkGates
    coarse: jax.Array
    fine: jax.Array
    m: jax.Array
    before_m: jax.Array
    last_m: jax.Array
    read: jax.Array
    write: jax.Array
    keep: jax.Array
    first: jax.Array
    last: jax.Array


def _pad_time(x: jax.Array, padding: int, value: float = 0) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)], constant_values=value)


def token_gates(inputs: MLSTMInputs, reset: jax.Array | None, padding: int) -> TokenGates:
    """Computes what the gates say; `padding` tokens are added that change nothing."""
    i, log_f = _pad_time(inputs.i, padding, PADDING_GATE), _pad_time(inputs.log_f, padding)
    if reset is not None:
        reset = _pad_time(reset, padding)
    chunk = chunk_gates(i, log_f, reset, CHUNK)
    if reset is None:
        first, last = jnp.zeros_like(chunk.i), jnp.full_like(chunk.i, CHUNK - 1)
    else:
        reset = reset.reshape(chunk.i.shape)
        first = document_starts(reset).astype(jnp.float32)
        ends = jnp.where(reset, jnp.arange(CHUNK, dtype=jnp.float32), CHUNK) - 1
        last = lax.cummin(_pad_time(ends[..., 1:], 1, CHUNK - 1), axis=2, reverse=True)

    # The log scales between the chunks: max-plus, in log steps.
    carry, local_m = chunk.carry[..., -1], jnp.max(chunk.write, axis=-1)
    if chunk.floor is not None:
        local_m = jnp.maximum(local_m, chunk.floor[..., -1])

    def combine(x, y):
        return x[0] + y[0], jnp.maximum(x[1] + y[0], y[1])

    carry, local_m = lax.associative_scan(combine, (carry, local_m), axis=1)
    initial_m = inputs.state.m.reshape(-1, 1)
    after_m = jnp.maximum(carry + initial_m, local_m)
    before_m = jnp.concatenate([initial_m, after_m[:, :-1]], axis=1)

    coarse, fine = exact_and_small_sums(chunk.log_f)
    m = log_scales(pair_log_weights(chunk.i, chunk.log_f, chunk.document), chunk, before_m)
    log_carry = chunk.carry + before_m[..., None]
    return TokenGates(
        chunk=chunk,
        coarse=coarse,
        fine=fine,
        m=m,
        before_m=before_m,
        last_m=after_m[:, -1],
        read=jnp.exp(log_carry - m) * inputs.q.shape[-1] ** -0.5,
        write=jnp.exp(chunk.write - after_m[..., None]),
        keep=jnp.exp(log_carry[..., -1] - after_m),
        first=first,
        last=last,
    )


def gate_rows(gates: TokenGates, dim: int, log_norm, norm, row_6, row_7) -> jax.Array:
    """Returns `decayed_attention.Inputs.gates`; `dim` is `DHQK`."""
    reader = gates.fine - gates.m - 0.5 * math.log(dim) - log_norm
    writer = gates.chunk.i - gates.fine
    rows = gates.coarse, reader, writer, gates.first, gates.read / norm, gates.write, row_6, row_7
    return jnp.stack(rows, axis=2)


def carry_over(local: jax.Array, keep: jax.Array, initial: jax.Array, reverse: bool):
    """Hands a vector on from chunk to chunk: `after = keep * before + local`, in log steps.

    Args:
        local: What each chunk adds `(N, NC, D)`.
        keep: Factor over each chunk `(N, NC)`.
        initial: The vector before the first chunk, or after the last one if `reverse`, `(N, D)`.
        reverse: Whether to begin with the last chunk.

    Returns:
        The vector before each chunk in that direction `(N, NC, D)`, and the last one `(N, D)`.
    """

    def combine(x, y):
        return x[0] * y[0], x[1] * y[0] + y[1]

    factors, sums = lax.associative_scan(combine, (keep[..., None], local), axis=1, reverse=reverse)
    after = factors * initial[:, None] + sums
    if reverse:
        return jnp.concatenate([after[:, 1:], initial[:, None]], axis=1), after[:, 0]
    return jnp.concatenate([initial[:, None], after[:, :-1]], axis=1), after[:, -1]


def weighted_sums(tokens: Tokens, x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the sums over each chunk of `x (B, T, NH * D)` times `weights (N, NC, L)`."""
    batch, time, _ = x.shape
    # Heads and features are one axis, or XLA would write the products before it sums them.
    x = x.reshape(batch * time // CHUNK, CHUNK, -1).astype(jnp.float32)
    weights = tokens.tokens(weights[..., None]).reshape(*x.shape[:2], tokens.heads)
    sums = jnp.sum(x * jnp.repeat(weights, x.shape[-1] // tokens.heads, axis=-1), axis=1)
    sums = sums.reshape(batch, time // CHUNK, tokens.heads, -1).swapaxes(1, 2)
    return sums.reshape(batch * tokens.heads, *sums.shape[2:])


def read_vector(tokens: Tokens, x: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns the products `(N, NC, L)` of `x (B, T, NH * D)` and `vector (N, NC, D)`."""
    batch, time, _ = x.shape
    y = x.reshape(batch, time // CHUNK, CHUNK, tokens.heads, -1).astype(jnp.float32)
    products = jnp.sum(y * tokens.tokens(vector[:, :, None]), axis=-1)
    return tokens.chunks(products.reshape(batch, time, tokens.heads))


def pad_state(x: jax.Array) -> jax.Array:
    """Pads the features of a state `(N, D, E)` as `Tokens.fold` does."""
    return jnp.pad(x, [(0, 0)] + [(0, -size % FEATURES) for size in x.shape[1:]])
