"""Reading prompts and writing what follows them, a token at a time.

    logits, state = prefill(params, prompts, config=config)
    logits, state = decode_step(params, tokens, state, config=config)

is all that a loop of one's own needs. With sampling, and with rows that end on their own:

    tokens = generate(params, prompts, rng, config=config, num_tokens=100, sampling=sampling)

and in several goes, on a mesh, or with more text in between:

    progress = begin(config, batch_size, mesh)
    progress = read(params, progress, prompts, lengths, config=config)
    progress, tokens = write(params, progress, keys, 100, config=config, ...)

A prompt is read chunkwise, by the configured backend; then the state, of constant size, is carried
from token to token. Parameters may be anywhere on a mesh (but not cut into pipeline stages): these
functions run outside of `shard_map`, and XLA divides the work as the parameters are divided.
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

# Tokens of all rows that are read at once, so that long prompts need no more memory than others.
_TOKENS_AT_ONCE = 16384

NO_TOKEN = -1  # Stands behind the last token of a row.


class Progress(NamedTuple):
    """How far the texts of a batch are; all that is needed to go on.

    Attributes:
        logits: Logits of each row's next token, float32 `(B, V)`.
        state: The model's state after all tokens so far, leading axes `(num_blocks, B)`.
        seen: Which tokens have occurred, bool `(B, V)`.
        num_tokens: How many tokens have been read and written, int32 `(B,)`.
        done: Rows that are not written any further, bool `(B,)`.
    """

    logits: jax.Array
    state: PyTree
    seen: jax.Array
    num_tokens: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames="config")
def prefill(
    params: PyTree,
    tokens: jax.Array,
    state: PyTree | None = None,
    lengths: jax.Array | None = None,
    *,
    config: LanguageModelConfig,
) -> tuple[jax.Array, PyTree]:
    """Reads prompts.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B, T)`; a document begins with the end-of-document id.
        state: The state before them; None for the zero state.
        lengths: How many of the tokens count, int `(B,)`; what is behind is padding. None for all.
        config: Configuration of the model.

    Returns:
        Logits of the token after each prompt, float32 `(B, V)` (meaningless where the length is 0),
        and the state after the prompts.
    """
    batch, time = tokens.shape
    if state is None:
        state = initial_state(config, batch)
    read = functools.partial(
        xLSTMLMModel(config).apply, {"params": params}, method="next_token_logits"
    )
    size = max(1, _TOKENS_AT_ONCE // batch)
    if time <= size:
        return read(tokens, state, lengths)
    if lengths is None:
        lengths = jnp.full((batch,), time)
    tokens = jnp.pad(tokens, ((0, 0), (0, -time % size)))
    pieces = tokens.reshape(batch, -1, size).swapaxes(0, 1)

    def body(carry, xs):
        logits, state = carry
        start, piece = xs
        inside = jnp.clip(lengths - start, 0, size)
        new_logits, state = read(piece, state, inside)
        return (jnp.where(inside[:, None] > 0, new_logits, logits), state), None

    logits = jnp.zeros((batch, config.model.vocab_size), jnp.float32)
    (logits, state), _ = lax.scan(body, (logits, state), (jnp.arange(len(pieces)) * size, pieces))
    return logits, state


@functools.partial(jax.jit, static_argnames="config")
def decode_step(
    params: PyTree, tokens: jax.Array, state: PyTree, *, config: LanguageModelConfig
) -> tuple[jax.Array, PyTree]:
    """Reads one more token of each text.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B,)`.
        state: The state before them, of `prefill` or of the step before.
        config: Configuration of the model.

    Returns:
        Logits of the next token, float32 `(B, V)`, and the state.
    """
    return _stepwise(config).apply(
        {"params": params}, tokens[:, None], state, method="next_token_logits"
    )


def _stepwise(config: LanguageModelConfig) -> xLSTMLMModel:
    backend = dataclasses.replace(config.backend, name="recurrent")
    return xLSTMLMModel(dataclasses.replace(config, backend=backend))


def begin(config: LanguageModelConfig, batch_size: int, mesh: Mesh | None = None) -> Progress:
    """How far texts are before anything is read.

    Args:
        config: Configuration of the model.
        batch_size: `B`.
        mesh: Where to place it: rows are divided over `dp` and `fsdp` if they can be, heads over
            `tp`; None for the default device.

    Returns:
        The beginning of `B` texts, which have no next token yet.
    """

    def make() -> Progress:
        return Progress(
            logits=jnp.zeros((batch_size, config.model.vocab_size), jnp.float32),
            state=initial_state(config, batch_size),
            seen=jnp.zeros((batch_size, config.model.vocab_size), bool),
            num_tokens=jnp.zeros((batch_size,), jnp.int32),
            done=jnp.zeros((batch_size,), bool),
        )

    if mesh is None:
        return make()
    return jax.jit(make, out_shardings=progress_shardings(config, batch_size, mesh))()


def progress_shardings(config: LanguageModelConfig, batch_size: int, mesh: Mesh) -> Progress:
    """Where a mesh has what `Progress` holds, see `begin`."""
    rows = rows_spec(batch_size, mesh)
    specs = Progress(P(*rows), state_specs(config, *rows), P(*rows), P(*rows), P(*rows))
    return jax.tree.map(functools.partial(NamedSharding, mesh), specs)


def rows_spec(batch_size: int, mesh: Mesh) -> P:
    """How the rows of a batch lie on a mesh: divided, if they can be."""
    num_parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return P(None if batch_size % num_parts else BATCH_AXES)


@functools.partial(jax.jit, static_argnames="config")
def read(
    params: PyTree,
    progress: Progress,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    *,
    config: LanguageModelConfig,
) -> Progress:
    """Reads prompts, or what is added to texts that were begun before.

    Args:
        params: Parameters of the model.
        progress: How far the texts are.
        tokens: Ids `(B, T)`; a document begins with the end-of-document id.
        lengths: How many of them count, int `(B,)`, for the beginning of a text at least 1; None
            for all.
        config: Configuration of the model.

    Returns:
        How far the texts are then; no row is done.
    """
    batch, time = tokens.shape
    if lengths is None:
        lengths = jnp.full((batch,), time)
    logits, state = prefill(params, tokens, progress.state, lengths, config=config)
    # A token behind the end counts as the place behind the vocabulary, which is dropped.
    counted = jnp.where(jnp.arange(time) < lengths[:, None], tokens, config.model.vocab_size)
    return Progress(
        logits=jnp.where(lengths[:, None] > 0, logits, progress.logits),
        state=state,
        seen=progress.seen.at[jnp.arange(batch)[:, None], counted].set(True),
        num_tokens=progress.num_tokens + lengths,
        done=jnp.zeros_like(progress.done),
    )


def row_keys(rng: PRNGKeyArray, rows: Sequence[int]) -> PRNGKeyArray:
    """Derives a random key `(B, ...)` for each of some rows from their numbers."""
    return jax.vmap(functools.partial(jax.random.fold_in, rng))(np.asarray(rows))


@functools.partial(
    jax.jit,
    static_argnames=("config", "sampling", "stop_ids", "max_tokens"),
    donate_argnames="progress",
)
def write(
    params: PyTree,
    progress: Progress,
    keys: PRNGKeyArray,
    num_tokens: jax.Array | int,
    *,
    config: LanguageModelConfig,
    sampling: SamplingConfig,
    max_tokens: int,
    stop_ids: tuple[int, ...] = (),
) -> tuple[Progress, jax.Array]:
    """Writes some tokens more.

    What is written in a row depends on its key and the place in its text, and not on how many
    tokens are written at once or what other rows there are.

    Args:
        params: Parameters of the model.
        progress: How far the texts are; it is consumed.
        keys: A random key for each row, `(B, ...)`, see `row_keys`.
        num_tokens: How many tokens to write, at most; less once all rows are done.
        config: Configuration of the model.
        sampling: How tokens are chosen.
        max_tokens: The largest `num_tokens` that the compiled program is for.
        stop_ids: Ids that end a row; they are its last tokens.

    Returns:
        How far the texts are then, and the tokens, int32 `(B, max_tokens)`, `NO_TOKEN` where there
        is none.
    """
    batch, model = progress.done.shape[0], _stepwise(config)
    rows, stops = jnp.arange(batch), jnp.asarray(stop_ids, jnp.int32)

    def is_going_on(carry):
        index, progress, _ = carry
        return (index < num_tokens) & ~jnp.all(progress.done)

    def body(carry):
        index, (logits, state, seen, count, done), written = carry
        tokens = sample(logits, seen, jax.vmap(jax.random.fold_in)(keys, count), sampling)
        # A row that is done keeps its state: what it would read is padding.
        is_read = jnp.where(done, 0, 1)
        new_logits, state = model.apply(
            {"params": params}, tokens[:, None], state, is_read, method="next_token_logits"
        )
        progress = Progress(
            logits=jnp.where(done[:, None], logits, new_logits),
            state=state,
            seen=seen.at[rows, tokens].max(~done),
            num_tokens=count + is_read,
            done=done | jnp.isin(tokens, stops),
        )
        return index + 1, progress, written.at[:, index].set(jnp.where(done, NO_TOKEN, tokens))

    written = jnp.full((batch, max_tokens), NO_TOKEN, jnp.int32)
    _, progress, written = lax.while_loop(is_going_on, body, (0, progress, written))
    return progress, written


def generate(
    params: PyTree,
    prompts: jax.Array,
    rng: PRNGKeyArray,
    *,
    config: LanguageModelConfig,
    num_tokens: int,
    sampling: SamplingConfig,
    lengths: jax.Array | None = None,
    stop_ids: Sequence[int] = (),
) -> jax.Array:
    """Continues prompts.

    Args:
        params: Parameters of the model.
        prompts: Ids `(B, T)`; a document begins with the end-of-document id.
        rng: Random key.
        config: Configuration of the model.
        num_tokens: The largest number of tokens to write.
        sampling: How tokens are chosen.
        lengths: How many tokens of each prompt count, int `(B,)`, at least 1; None for all.
        stop_ids: Ids that end a row; they are its last tokens.

    Returns:
        The tokens written, int32 `(B, num_tokens)`; `NO_TOKEN` behind the end of a row.
    """
    progress = begin(config, len(prompts))
    progress = read(params, progress, prompts, lengths, config=config)
    _, tokens = write(
        params,
        progress,
        row_keys(rng, range(len(prompts))),
        num_tokens,
        config=config,
        sampling=sampling,
        max_tokens=num_tokens,
        stop_ids=tuple(stop_ids),
    )
    return tokens
