"""Scores: the log-likelihood of given continuations of given contexts, for batches of any lengths.

    scores = score(run, contexts, continuations)
    best = max(range(len(scores)), key=lambda i: scores[i].log_likelihood)

A context that several continuations follow is read once: they start from its state, whose size does
not depend on its length. The memory does not depend on the number of tokens either: a continuation
is read in parts, and the logits of one part exist at a time.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlstm.common_types import PyTree
from xlstm.inference.decode import decode_state_shardings, init_decode_state, prefill_step
from xlstm.inference.generate import check_prompts, pad_rows
from xlstm.inference.loaded_model import LoadedModel
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.multihost import to_host

# Over all rows, in one pass: the largest number of tokens, and of logits (256 MiB of them).
_PASS_TOKENS = 16384
_PASS_LOGITS = 2**26


class Score(NamedTuple):
    """The score of a continuation.

    Attributes:
        log_likelihood: The sum of the log-probabilities of its tokens, in nats.
        is_greedy: Whether each of its tokens has the largest logit.
    """

    log_likelihood: float
    is_greedy: bool


def score(
    model: LoadedModel,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    on_score: Callable[[int, Score], None] = lambda index, score: None,
) -> list[Score]:
    """Computes the log-likelihood of each continuation, given its context.

    A score does not depend on the batch size or the other rows, up to rounding.

    Args:
        model: The model.
        contexts: Ids of each context, at least one; a document begins with `bos_id`.
        continuations: Ids of the continuation of each context; none have log-likelihood 0.
        batch_size: The number of rows at once.
        on_score: Called with each index and its score, as they arrive: the longest contexts first.

    Returns:
        The score of each continuation.

    Raises:
        ValueError: If a context is empty, an id is outside of the vocabulary, or `batch_size` is
            not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: it must be at least 1")
    check_prompts(model, contexts)
    check_prompts(model, continuations, may_be_empty=True)
    sharing: dict[tuple[int, ...], list[int]] = {}
    for index, (context, _) in enumerate(zip(contexts, continuations, strict=True)):
        sharing.setdefault(tuple(context), []).append(index)
    # Contexts of a batch have similar lengths, so that little of it is padding.
    groups = sorted(sharing.items(), key=lambda group: -len(group[0]))
    scores: list[Score | None] = [None] * len(contexts)
    batch_size = min(batch_size, max(1, len(contexts)))
    for start in range(0, len(groups), batch_size):
        batch = groups[start : start + batch_size]
        # The last token of a context predicts the first one of its continuations.
        states = _prefill(model, [context[:-1] for context, _ in batch], batch_size)
        rows = [(row, index) for row, (_, indices) in enumerate(batch) for index in indices]
        rows.sort(key=lambda pair: -len(continuations[pair[1]]))
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            texts = [[contexts[index][-1], *continuations[index]] for _, index in part]
            found = _score_rows(model, states, [row for row, _ in part], texts, batch_size)
            for (_, index), result in zip(part, found, strict=True):
                scores[index] = result
                on_score(index, result)
    return scores


def _prefill(model: LoadedModel, prefixes: list[Sequence[int]], batch_size: int) -> PyTree:
    """Returns the model's state after each prefix, in a batch of `batch_size` rows."""
    shardings = decode_state_shardings(model.config, batch_size, model.mesh)
    state = init_decode_state(model.config, batch_size, model.mesh).state
    tokens, lengths = pad_rows([*prefixes, *[[]] * (batch_size - len(prefixes))])
    if lengths.any():
        tokens, lengths = (jax.device_put(x, shardings.done) for x in (tokens, lengths))
        _, state = prefill_step(model.params, tokens, state, lengths, config=model.config)
    # The inputs of each program always have the same shardings, so that it is compiled once.
    return jax.device_put(state, shardings.state)


def _score_rows(
    model: LoadedModel,
    states: PyTree,
    state_rows: list[int],
    texts: list[Sequence[int]],
    batch_size: int,
) -> list[Score]:
    """Scores all tokens but the first of each text, which continues a row of `states`."""
    missing = batch_size - len(texts)
    tokens, lengths = pad_rows([*texts, *[[0]] * missing], least=4)
    state_rows = np.array([*state_rows, *[0] * missing])
    targets = np.roll(tokens, -1, axis=1)
    rows = decode_state_shardings(model.config, batch_size, model.mesh).done
    arrays = (jax.device_put(x, rows) for x in (state_rows, tokens, targets))
    found = score_step(model.params, states, *arrays, config=model.config)
    log_probs, is_greedy = (to_host(x) for x in found)
    results = []
    for row, length in enumerate(lengths[: len(texts)]):
        # A float32 sum over a long document would lose digits.
        total = float(np.sum(log_probs[row, : length - 1], dtype=np.float64))
        results.append(Score(total, bool(np.all(is_greedy[row, : length - 1]))))
    return results


@functools.partial(jax.jit, static_argnames="config")
def score_step(
    params: PyTree,
    states: PyTree,
    state_rows: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    config: LanguageModelConfig,
) -> tuple[jax.Array, jax.Array]:
    """Computes the log-probability of the target of each token.

    Args:
        params: Parameters of the model.
        states: States of the model, leading axes `(num_blocks, B')`.
        state_rows: The row of `states` before each row's first token, int `(B,)`.
        tokens: Ids `(B, T)`.
        targets: Ids `(B, T)`.
        config: Configuration of the model.

    Returns:
        The log-probabilities, float32 `(B, T)`, and whether each target has the largest logit, bool
        `(B, T)`.
    """
    (batch, time), vocab_size = tokens.shape, config.model.vocab_size
    size = max(1, min(_PASS_TOKENS, _PASS_LOGITS // vocab_size) // batch)
    size = min(2 ** (size.bit_length() - 1), time)  # A multiple of the backend's chunk.

    def body(state, xs):
        chunk, chunk_targets = xs
        logits, state = xLSTMLMModel(config).apply({"params": params}, chunk, state=state)
        found = jnp.take_along_axis(logits, chunk_targets[..., None], axis=-1)[..., 0]
        log_probs = found - jax.nn.logsumexp(logits, axis=-1)
        return state, (log_probs, jnp.argmax(logits, axis=-1) == chunk_targets)

    def split(x):
        return jnp.pad(x, ((0, 0), (0, -time % size))).reshape(batch, -1, size).swapaxes(0, 1)

    state = jax.tree.map(lambda x: x[:, state_rows], states)
    _, found = lax.scan(body, state, (split(tokens), split(targets)))
    log_probs, is_greedy = (x.swapaxes(0, 1).reshape(batch, -1)[:, :time] for x in found)
    return log_probs, is_greedy
