"""Prefilling and decoding: logits and states of token ids, one batch at a time.

For a decoding loop of your own, carry the model's state from token to token:

    logits, state = prefill_step(params, prompts, config=config)
    logits, state = decode_step(params, tokens, state, config=config)

To sample, with rows that end at different positions:

    tokens = generate(params, prompts, rng, config=config, max_tokens=100, sampling=sampling)

To sample in several calls, on a mesh, or with more prompt tokens in between:

    decode_state = init_decode_state(config, batch_size, mesh)
    decode_state = prefill(params, decode_state, prompts, lengths, config=config)
    decode_state, tokens = decode(params, decode_state, keys, 100, config=config, ...)

Prefilling is chunkwise, with the configured backend; decoding takes one step of the `recurrent`
backend per token. The size of the model's state does not depend on the number of tokens. The
functions run outside of `shard_map`: XLA partitions them as the parameters are partitioned, which
may be over any mesh axis but `pp` (see `reshard_for_inference`).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import PRNGKeyArray, PyTree
from xlstm.distributed.mesh import BATCH_AXES
from xlstm.inference.sampling import SamplingConfig, sample
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import (
    initial_state,
    state_specs,
    xLSTMLMModel,
)

# Prompt tokens, over all rows, in one pass; longer prompts take several, and no more memory.
_PREFILL_TOKENS = 16384

PAD_ID = -1  # Follows the last token of a row.


class DecodeState(NamedTuple):
    """A batch of sequences between two calls of `prefill` and `decode`.

    Attributes:
        logits: Logits of each row's next token, float32 `(B, V)`.
        state: The model's state after all tokens so far, leading axes `(num_blocks, B)`.
        seen: Which tokens have occurred, bool `(B, V)`.
        num_tokens: The number of tokens so far, prompt included, int32 `(B,)`.
        done: Which rows have ended, bool `(B,)`.
    """

    logits: jax.Array
    state: PyTree
    seen: jax.Array
    num_tokens: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def compute_logits(params: PyTree, tokens: jax.Array, *, config: LanguageModelConfig) -> jax.Array:
    """Computes the logits at every position, in one forward pass.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B, T)`; a document begins with `bos_id`.
        config: Configuration of the model.

    Returns:
        Logits of the token that follows each token, float32 `(B, T, V)`.
    """
    return xLSTMLMModel(config).apply({"params": params}, tokens)


@functools.partial(jax.jit, static_argnames="config")
def prefill_step(
    params: PyTree,
    tokens: jax.Array,
    state: PyTree | None = None,
    lengths: jax.Array | None = None,
    *,
    config: LanguageModelConfig,
) -> tuple[jax.Array, PyTree]:
    """Computes the logits and the state after prompts.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B, T)`; a document begins with `bos_id`.
        state: The model's state before them; None for the zero state.
        lengths: The number of tokens in each row, int `(B,)`; the rest of the row is padding.
            None for `T`.
        config: Configuration of the model.

    Returns:
        Logits of the token after each prompt, float32 `(B, V)` (undefined where the length is 0),
        and the model's state after the prompts.
    """
    batch, time = tokens.shape
    if state is None:
        state = initial_state(config, batch)
    apply = functools.partial(
        xLSTMLMModel(config).apply, {"params": params}, method="next_token_logits"
    )
    size = max(1, _PREFILL_TOKENS // batch)
    if time <= size:
        return apply(tokens, state, lengths)
    if lengths is None:
        lengths = jnp.full((batch,), time)
    tokens = jnp.pad(tokens, ((0, 0), (0, -time % size)))
    chunks = tokens.reshape(batch, -1, size).swapaxes(0, 1)

    def body(carry, xs):
        logits, state = carry
        start, chunk = xs
        inside = jnp.clip(lengths - start, 0, size)
        new_logits, state = apply(chunk, state, inside)
        return (jnp.where(inside[:, None] > 0, new_logits, logits), state), None

    logits = jnp.zeros((batch, config.model.vocab_size), jnp.float32)
    (logits, state), _ = lax.scan(body, (logits, state), (jnp.arange(len(chunks)) * size, chunks))
    return logits, state


@functools.partial(jax.jit, static_argnames="config")
def decode_step(
    params: PyTree, tokens: jax.Array, state: PyTree, *, config: LanguageModelConfig
) -> tuple[jax.Array, PyTree]:
    """Computes the logits and the state after one more token in each row.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B,)`.
        state: The model's state before them, from `prefill_step` or the previous step.
        config: Configuration of the model.

    Returns:
        Logits of the next token, float32 `(B, V)`, and the model's state.
    """
    return _recurrent_model(config).apply(
        {"params": params}, tokens[:, None], state, method="next_token_logits"
    )


def _recurrent_model(config: LanguageModelConfig) -> xLSTMLMModel:
    backend = dataclasses.replace(config.backend, name="recurrent")
    return xLSTMLMModel(dataclasses.replace(config, backend=backend))


def init_decode_state(
    config: LanguageModelConfig, batch_size: int, mesh: Mesh | None = None
) -> DecodeState:
    """Returns the state of a batch of empty sequences, for `prefill`.

    Args:
        config: Configuration of the model.
        batch_size: `B`.
        mesh: The mesh to place the state on: rows are sharded over `dp` and `fsdp` if `B` is a
            multiple of their sizes, heads over `tp`. None for the default device.

    Returns:
        The state; its logits are zero until the first prefill.
    """

    def make() -> DecodeState:
        return DecodeState(
            logits=jnp.zeros((batch_size, config.model.vocab_size), jnp.float32),
            state=initial_state(config, batch_size),
            seen=jnp.zeros((batch_size, config.model.vocab_size), bool),
            num_tokens=jnp.zeros((batch_size,), jnp.int32),
            done=jnp.zeros((batch_size,), bool),
        )

    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=decode_state_shardings(config, batch_size, mesh))()


def decode_state_shardings(config: LanguageModelConfig, batch_size: int, mesh: Mesh) -> DecodeState:
    """Returns the sharding of each array of a `DecodeState`; see `init_decode_state`."""
    rows = rows_spec(batch_size, mesh)
    specs = DecodeState(P(*rows), state_specs(config, *rows), P(*rows), P(*rows), P(*rows))
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def rows_spec(batch_size: int, mesh: Mesh) -> P:
    """Returns the partition spec of a batch's rows: replicated if they do not divide evenly."""
    num_shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return P(None if batch_size % num_shards else BATCH_AXES)


@functools.partial(jax.jit, static_argnames="config")
def prefill(
    params: PyTree,
    decode_state: DecodeState,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    *,
    config: LanguageModelConfig,
) -> DecodeState:
    """Appends prompts to sequences, or further tokens to sequences with a prompt.

    Args:
        params: Parameters of the model.
        decode_state: The sequences.
        tokens: Ids `(B, T)`; a document begins with `bos_id`.
        lengths: The number of tokens in each row, int `(B,)`, at least 1 for an empty sequence;
            None for `T`.
        config: Configuration of the model.

    Returns:
        The sequences with their new tokens; no row is done.
    """
    batch, time = tokens.shape
    if lengths is None:
        lengths = jnp.full((batch,), time)
    logits, state = prefill_step(params, tokens, decode_state.state, lengths, config=config)
    # Padding gets an id outside of the vocabulary, which `set` drops.
    tokens = jnp.where(jnp.arange(time) < lengths[:, None], tokens, config.model.vocab_size)
    return DecodeState(
        logits=jnp.where(lengths[:, None] > 0, logits, decode_state.logits),
        state=state,
        seen=decode_state.seen.at[jnp.arange(batch)[:, None], tokens].set(True),
        num_tokens=decode_state.num_tokens + lengths,
        done=jnp.zeros_like(decode_state.done),
    )


def row_keys(rng: PRNGKeyArray, indices: Sequence[int]) -> PRNGKeyArray:
    """Derives a random key for each row from the row's index; returns keys `(B, ...)`."""
    return jax.vmap(functools.partial(jax.random.fold_in, rng))(np.asarray(indices))


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "stop_ids", "max_tokens"),
    donate_argnames="decode_state",
)
def decode(
    params: PyTree,
    decode_state: DecodeState,
    keys: PRNGKeyArray,
    num_tokens: jax.Array | int,
    *,
    config: LanguageModelConfig,
    sampling: SamplingConfig,
    max_tokens: int,
    stop_ids: tuple[int, ...] = (),
) -> tuple[DecodeState, jax.Array]:
    """Samples tokens and appends them to sequences.

    The tokens of a row depend on its key and their positions alone, not on the number of tokens
    per call or the other rows.

    Args:
        params: Parameters of the model.
        decode_state: The sequences; donated.
        keys: A random key for each row, `(B, ...)`; see `row_keys`.
        num_tokens: The largest number of tokens to sample; fewer if all rows end before.
        config: Configuration of the model.
        sampling: How to sample.
        max_tokens: The upper bound of `num_tokens` to compile for.
        stop_ids: Ids that end a row; each is the last token of its row.

    Returns:
        The sequences with their new tokens, and these tokens, int32 `(B, max_tokens)`, padded with
        `PAD_ID`.
    """
    batch, model = decode_state.done.shape[0], _recurrent_model(config)
    rows, stops = jnp.arange(batch), jnp.asarray(stop_ids, jnp.int32)

    def keep_going(carry):
        index, decode_state, _ = carry
        return (index < num_tokens) & ~jnp.all(decode_state.done)

    def body(carry):
        index, (logits, state, seen, count, done), new_tokens = carry
        tokens = sample(logits, seen, jax.vmap(jax.random.fold_in)(keys, count), sampling)
        # A row that is done keeps its state: its tokens are padding.
        lengths = jnp.where(done, 0, 1)
        new_logits, state = model.apply(
            {"params": params}, tokens[:, None], state, lengths, method="next_token_logits"
        )
        decode_state = DecodeState(
            logits=jnp.where(done[:, None], logits, new_logits),
            state=state,
            seen=seen.at[rows, tokens].max(~done),
            num_tokens=count + lengths,
            done=done | jnp.isin(tokens, stops),
        )
        new_tokens = new_tokens.at[:, index].set(jnp.where(done, PAD_ID, tokens))
        return index + 1, decode_state, new_tokens

    new_tokens = jnp.full((batch, max_tokens), PAD_ID, jnp.int32)
    _, decode_state, new_tokens = lax.while_loop(keep_going, body, (0, decode_state, new_tokens))
    return decode_state, new_tokens


def generate(
    params: PyTree,
    prompts: jax.Array,
    rng: PRNGKeyArray,
    *,
    config: LanguageModelConfig,
    max_tokens: int,
    sampling: SamplingConfig,
    lengths: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
) -> jax.Array:
    """Samples continuations of prompts.

    Args:
        params: Parameters of the model.
        prompts: Ids `(B, T)`; a document begins with `bos_id`.
        rng: Random key.
        config: Configuration of the model.
        max_tokens: The largest number of tokens to sample.
        sampling: How to sample.
        lengths: The number of tokens of each prompt, int `(B,)`, at least 1; None for `T`.
        stop_ids: Ids that end a row; each is the last token of its row.

    Returns:
        The sampled tokens, int32 `(B, max_tokens)`, padded with `PAD_ID`.
    """
    decode_state = init_decode_state(config, len(prompts))
    decode_state = prefill(params, decode_state, prompts, lengths, config=config)
    _, tokens = decode(
        params,
        decode_state,
        row_keys(rng, range(len(prompts))),
        max_tokens,
        config=config,
        sampling=sampling,
        max_tokens=max_tokens,
        stop_ids=tuple(stop_ids),
    )
    return tokens
