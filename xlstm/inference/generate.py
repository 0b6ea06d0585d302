"""Text generation: completions of a batch of prompts, as text and token ids, while they grow."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.dataset.tokenizer import Tokenizer
from xlstm.inference.completion_detokenizer import CompletionDetokenizer
from xlstm.inference.decode import (
    PAD_ID,
    DecodeState,
    decode,
    decode_state_shardings,
    init_decode_state,
    prefill,
    row_keys,
)
from xlstm.inference.loaded_model import LoadedModel
from xlstm.inference.sampling import SamplingConfig
from xlstm.trainer.base.multihost import to_host

# Tokens per call of `decode` unless each must be seen at once: amortizes the cost of a call.
_TOKENS_PER_CALL = 32


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation.

    Attributes:
        max_tokens: The largest number of tokens of a completion.
        sampling: How to sample them.
        stop_strings: Strings that end a completion and are not part of it.
        seed: The sampled tokens depend on it, the prompt's index and the position only.
        token_by_token: Whether to report each token at once, which is slower.
    """

    max_tokens: int
    sampling: SamplingConfig
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    token_by_token: bool = False

    def __post_init__(self):
        """Checks what `SamplingConfig` does not."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: it must be at least 1")
        if "" in self.stop_strings:
            raise ValueError("a stop string is empty: it would end every completion at once")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: it must be from 0 to {2**32 - 1}")


class TextChunk(NamedTuple):
    """New tokens of a row, and the text that no later token can change."""

    row: int
    ids: list[int]
    text: str


@dataclasses.dataclass
class Completion:
    """Text generated after a prompt.

    Attributes:
        ids: The tokens, including what ended the completion.
        text: The text, without what ended the completion; empty without a tokenizer.
        reason: Why it ended: "length", "end" (a token that ends texts) or "stop" (a stop string).
        end_token: The token that ended it, or its id without a tokenizer; None for other reasons.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    reason: str = "length"
    end_token: str | int | None = None


class GenerationState(NamedTuple):
    """A batch of texts between two calls of `generate_text`.

    Attributes:
        decode_state: The state of the model and the sampling.
        detokenizer_states: The detokenizer's state of each row; empty without a tokenizer.
    """

    decode_state: DecodeState
    detokenizer_states: Sequence[DetokenizerState]


def encode_prompt(
    model: LoadedModel, text: str, state: DetokenizerState | None = None
) -> list[int]:
    """Encodes a prompt.

    Args:
        model: The model, with a tokenizer.
        text: The prompt.
        state: The detokenizer's state of the text that the prompt continues; None for a new
            document, which starts with the begin-of-document id.

    Returns:
        The ids.

    Raises:
        ValueError: If the tokenizer has no token for a character.
    """
    if state is None:
        return [model.tokenizer.bos_id, *model.tokenizer.encode(text).tolist()]
    encode = model.tokenizer.encode if state.is_first else model.tokenizer.encode_continuation
    return encode(text).tolist()


def generate_text(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    state: GenerationState | None = None,
    is_continued: bool = False,
    first_index: int = 0,
    on_chunks: Callable[[list[TextChunk]], None] = lambda chunks: None,
) -> tuple[list[Completion], GenerationState]:
    """Generates completions of a batch of prompts of any lengths.

    Args:
        model: The model.
        prompts: Ids of each prompt; only with a state may a prompt be empty.
        config: The options.
        state: The state of the texts that the prompts continue; None for new texts.
        is_continued: Whether another call will continue the texts: it then gets the bytes of an
            incomplete last character.
        first_index: The index of the first prompt among all prompts, for the seed.
        on_chunks: Called with the new chunks of all rows, as they arrive.

    Returns:
        The completion of each prompt, and the state of the texts after them.

    Raises:
        ValueError: If a prompt is empty or has an id outside of the vocabulary.
    """
    check_prompts(model, prompts, may_be_empty=state is not None)
    rows = range(len(prompts))
    # The inputs of each program always have the same shardings, so that it is compiled once.
    shardings = decode_state_shardings(model.config, len(prompts), model.mesh)
    tokens, lengths = (jax.device_put(x, shardings.done) for x in _padded(prompts))
    decode_state = (
        state.decode_state if state else init_decode_state(model.config, len(prompts), model.mesh)
    )
    decode_state = jax.device_put(decode_state, shardings)
    decode_state = prefill(model.params, decode_state, tokens, lengths, config=model.config)
    decode_state = jax.device_put(decode_state, shardings)
    keys = row_keys(jax.random.PRNGKey(config.seed), [first_index + row for row in rows])
    completions = [Completion() for _ in rows]
    detokenizers = _create_detokenizers(model, prompts, config, state)
    # The model must not process a token after a stop string, which only the host can find.
    size = 1 if config.token_by_token or config.stop_strings else _TOKENS_PER_CALL
    for start in range(0, config.max_tokens, size):
        decode_state, tokens = decode(
            model.params,
            decode_state,
            keys,
            min(size, config.max_tokens - start),
            config=model.config,
            sampling=config.sampling,
            max_tokens=size,
            stop_ids=model.stop_ids,
        )
        ended = to_host(decode_state.done)
        on_chunks(_append(completions, to_host(tokens), ended, model.tokenizer, detokenizers))
        done = np.array([completion.reason != "length" for completion in completions])
        if done.all():
            break
        decode_state = jax.device_put(decode_state._replace(done=done), shardings)
    for row, detokenizer in enumerate(detokenizers):
        rest = detokenizer.finish(is_continued=is_continued)
        completions[row].text += rest
        on_chunks([TextChunk(row, [], rest)])
    states = [detokenizer.state for detokenizer in detokenizers]
    return completions, GenerationState(decode_state, states)


def _append(
    completions: Sequence[Completion],
    tokens: np.ndarray,
    ended: np.ndarray,
    tokenizer: Tokenizer | None,
    detokenizers: Sequence[CompletionDetokenizer],
) -> list[TextChunk]:
    """Appends new tokens to the completions of a batch.

    Args:
        completions: The completion of each row; modified.
        tokens: Result of `decode`, int32 `(B, max_tokens)`.
        ended: Which rows end with the last of their tokens, or ended before, bool `(B,)`.
        tokenizer: The tokenizer, or None.
        detokenizers: The detokenizer of each row; empty without a tokenizer.

    Returns:
        The chunk of each row that has new tokens.
    """
    chunks = []
    for row, ids in enumerate(tokens):
        ids, completion = ids[ids != PAD_ID].tolist(), completions[row]
        if not ids:
            continue
        # The token that ends a text is not part of it, even if it is not a special token.
        text = detokenizers[row].add(ids[:-1] if ended[row] else ids) if detokenizers else ""
        completion.ids += ids
        completion.text += text
        if ended[row]:
            completion.reason = "end"
            completion.end_token = tokenizer.id_to_token(ids[-1]) if tokenizer else ids[-1]
        elif detokenizers and detokenizers[row].is_stopped:
            completion.reason = "stop"
        chunks.append(TextChunk(row, ids, text))
    return chunks


def _create_detokenizers(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    state: GenerationState | None,
) -> list[CompletionDetokenizer]:
    """Creates the detokenizer of each row; none if the model has no tokenizer."""
    if not model.tokenizer:
        return []
    states = state.detokenizer_states if state else [None] * len(prompts)
    return [
        CompletionDetokenizer(model.tokenizer, ids, config.stop_strings, row_state)
        for ids, row_state in zip(prompts, states, strict=True)
    ]


def check_prompts(
    model: LoadedModel, prompts: Sequence[Sequence[int]], *, may_be_empty: bool = False
) -> None:
    """Raises ValueError if a prompt is empty or has an id outside of the vocabulary."""
    vocab_size = (model.tokenizer or model.config.model).vocab_size
    for index, prompt in enumerate(prompts):
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"prompt {index} has the token id {unknown[0]}: expected ids from 0 to"
                f" {vocab_size - 1}"
            )
        if not prompt and not may_be_empty:
            raise ValueError(f"prompt {index} is empty: expected at least one token")


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts, padded to one of a few widths to limit compilations, and lengths."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = max(1, int(lengths.max()))
    # Padding of the longest prompt is at most an eighth once prompts are long.
    step = max(16, 2 ** (longest.bit_length() - 3))
    tokens = np.zeros((len(prompts), math.ceil(longest / step) * step), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
