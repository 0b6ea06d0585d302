"""Scores: the log-likelihood of given continuations of given contexts, for batches of any lengths.

    scores = score(run, contexts, continuations)
    best = max(range(len(scores)), key=lambda i: scores[i].log_likelihood)

A context that several continuations follow is read once: they start from its state, whose size does
not depend on its length. The memory does not depend on the number of tokens either: texts are read
in parts, and the logits of one part exist at a time.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.common_types import PyTree
from xlstm.inference.decode import decode_state_shardings, init_decode_state, prefill_step
from xlstm.inference.generate import check_prompts
from xlstm.inference.loaded_model import LoadedModel
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.base.multihost import to_host

# Over all rows, in one pass: the largest number of tokens, and of logits (512 MiB in float32).
_PASS_TOKENS = 16384
_PASS_LOGITS = 2**27


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
    lengths = np.array([len(prefix) for prefix in prefixes])
    for start, width in _parts(max(lengths), _PASS_TOKENS // batch_size):
        tokens = _columns(prefixes, start, (batch_size, width))
        inside = np.zeros(batch_size, np.int32)
        inside[: len(prefixes)] = np.clip(lengths - start, 0, width)
        tokens, inside = jax.device_put((tokens, inside), shardings.done)
        _, state = prefill_step(model.params, tokens, state, inside, config=model.config)
        # The inputs of each program always have the same shardings, so that it is compiled once.
        state = jax.device_put(state, shardings.state)
    return state


def _score_rows(
    model: LoadedModel,
    states: PyTree,
    state_rows: list[int],
    texts: list[Sequence[int]],
    batch_size: int,
) -> list[Score]:
    """Scores all tokens but the first of each text, which continues a row of `states`."""
    shardings = decode_state_shardings(model.config, batch_size, model.mesh)
    rows = np.resize(state_rows, batch_size)
    state = jax.device_put(_take_rows(states, rows), shardings.state)
    targets, parts = [text[1:] for text in texts], []
    num_tokens = min(_PASS_TOKENS, _PASS_LOGITS // model.config.model.vocab_size)
    for start, width in _parts(max(map(len, targets)), num_tokens // batch_size):
        arrays = [_columns(ids, start, (batch_size, width)) for ids in (texts, targets)]
        arrays = jax.device_put(arrays, shardings.done)
        *found, state = score_step(model.params, *arrays, state, config=model.config)
        state = jax.device_put(state, shardings.state)
        parts.append(found)
    found = [[to_host(x) for x in part] for part in parts]
    results = []
    for row, ids in enumerate(targets):
        log_probs, is_greedy = (
            np.concatenate([[], *(part[i][row] for part in found)])[: len(ids)] for i in (0, 1)
        )
        # A float32 sum over a long document would lose digits.
        results.append(Score(float(np.sum(log_probs, dtype=np.float64)), bool(is_greedy.all())))
    return results


def _parts(length: int, largest: int) -> Iterator[tuple[int, int]]:
    """Yields the starts and widths of parts that cover a length.

    The widths are `largest`, rounded down to a power of two, and its quarters down to 4: few
    programs are compiled, and a multiple of the backend's chunk is read at once.
    """
    start, widest = 0, 2 ** (max(1, int(largest)).bit_length() - 1)
    while start < length:
        width = widest
        while width // 4 >= max(4, length - start):
            width //= 4
        yield start, width
        start += width


def _columns(rows: Sequence[Sequence[int]], start: int, shape: tuple[int, int]) -> np.ndarray:
    """Returns the columns of ragged rows from `start` on, padded to a shape."""
    columns = np.zeros(shape, np.int32)
    for padded, row in zip(columns, rows, strict=False):
        part = row[start : start + shape[1]]
        padded[: len(part)] = part
    return columns


@jax.jit
def _take_rows(states: PyTree, rows: np.ndarray) -> PyTree:
    return jax.tree.map(lambda x: x[:, rows], states)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def score_step(
    params: PyTree,
    tokens: jax.Array,
    targets: jax.Array,
    state: PyTree,
    *,
    config: LanguageModelConfig,
) -> tuple[jax.Array, jax.Array, PyTree]:
    """Computes the log-probability of the target of each token.

    Args:
        params: Parameters of the model.
        tokens: Ids `(B, T)`.
        targets: Ids `(B, T)`.
        state: The model's state before them; donated.
        config: Configuration of the model.

    Returns:
        The log-probabilities, float32 `(B, T)`; whether each target has the largest logit, bool
        `(B, T)`; and the model's state after the tokens.
    """
    logits, state = xLSTMLMModel(config).apply({"params": params}, tokens, state=state)
    found = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    log_probs = found - jax.nn.logsumexp(logits, axis=-1)
    return log_probs, jnp.argmax(logits, axis=-1) == targets, state
