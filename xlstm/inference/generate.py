"""Text that a model writes behind prompts, in batches, while it is written."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.inference.decode import (
    NO_TOKEN,
    Progress,
    begin,
    progress_shardings,
    read,
    row_keys,
    write,
)
from xlstm.inference.load_model import LoadedModel
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.streaming_detokenizer import TextStream
from xlstm.trainer.base.multihost import to_host

# Written at once where nobody watches: what a call costs no longer matters then.
_TOKENS_A_CALL = 32


@dataclasses.dataclass(frozen=True)
class WritingOptions:
    """What is to be written.

    Attributes:
        num_tokens: The largest number of tokens behind a prompt.
        sampling: How they are chosen.
        stops: Strings that end a text and do not belong to it.
        seed: With it, the number of the prompt and the place, what is sampled is certain.
        token_by_token: Whether each token is handed on at once, which takes longer.
    """

    num_tokens: int
    sampling: SamplingConfig
    stops: tuple[str, ...] = ()
    seed: int = 0
    token_by_token: bool = False

    def __post_init__(self):
        """Checks what `SamplingConfig` does not."""
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens={self.num_tokens}: it must be at least 1")
        if "" in self.stops:
            raise ValueError("a stop string is empty: every text would end at once")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed}: it must be from 0 to {2**32 - 1}")


class Piece(NamedTuple):
    """What is new in a row: ids, and the text that is certain by now."""

    row: int
    ids: list[int]
    text: str


@dataclasses.dataclass
class Written:
    """What was written behind a prompt.

    Attributes:
        ids: The tokens, with what ended them.
        text: Their text, without what ended it; empty if there is no tokenizer.
        reason: Why it ended: "length", "end" (a token that ends texts) or "stop" (a stop string).
        end_token: The token that ended it, or its id if there is no tokenizer; None for other
            reasons.
    """

    ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    reason: str = "length"
    end_token: str | int | None = None


class TextsSoFar(NamedTuple):
    """How far the texts of a batch are.

    Attributes:
        progress: How far the model is.
        states: What the text of each row leaves open; empty without a tokenizer.
    """

    progress: Progress
    states: Sequence[DetokenizerState]


def encode_prompt(
    model: LoadedModel, text: str, before: DetokenizerState | None = None
) -> list[int]:
    """Turns a prompt into ids.

    Args:
        model: The model.
        text: The prompt.
        before: What is left open by the text that it continues; None for the beginning of a
            document, which a marker stands in front of.

    Returns:
        The ids.

    Raises:
        ValueError: If the tokenizer has no token for some of its characters.
    """
    if before is None:
        return [model.tokenizer.bos_id, *model.tokenizer.encode(text).tolist()]
    encode = model.tokenizer.encode if before.is_first else model.tokenizer.encode_continuation
    return encode(text).tolist()


def write_texts(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    options: WritingOptions,
    *,
    before: TextsSoFar | None = None,
    is_continued: bool = False,
    first_number: int = 0,
    on_pieces: Callable[[list[Piece]], None] = lambda pieces: None,
) -> tuple[list[Written], TextsSoFar]:
    """Continues a batch of prompts of any lengths.

    Args:
        model: The model.
        prompts: Ids of each prompt; an empty one only where something was before.
        options: What is to be written.
        before: How far the texts are that the prompts continue; None if they begin.
        is_continued: Whether they will be continued: a character that lacks bytes at the end is
            then left to what follows.
        first_number: The number of the first prompt among all, for the seed.
        on_pieces: Called with what is new, as it comes.

    Returns:
        What was written behind each prompt, and how far the texts are then.

    Raises:
        ValueError: If a prompt is empty or holds an id that the model does not know.
    """
    _check_prompts(model, prompts, before)
    rows = range(len(prompts))
    # All that goes in always lies alike, so that each program is compiled once.
    shardings = progress_shardings(model.config, len(prompts), model.mesh)
    tokens, lengths = (jax.device_put(x, shardings.done) for x in _padded(prompts))
    progress = before.progress if before else begin(model.config, len(prompts), model.mesh)
    progress = jax.device_put(progress, shardings)
    progress = read(model.params, progress, tokens, lengths, config=model.config)
    progress = jax.device_put(progress, shardings)
    seed = jax.random.PRNGKey(options.seed)
    keys = row_keys(seed, [first_number + row for row in rows])
    written = [Written() for _ in rows]
    tokenizer, streams = model.tokenizer, _open_streams(model, prompts, options, before)
    # After a stop string nothing may be read any more: that is known after each token only.
    size = 1 if options.token_by_token or options.stops else _TOKENS_A_CALL
    for place in range(0, options.num_tokens, size):
        progress, tokens = write(
            model.params,
            progress,
            keys,
            min(size, options.num_tokens - place),
            config=model.config,
            sampling=options.sampling,
            max_tokens=size,
            stop_ids=model.end_ids,
        )
        done, pieces = to_host(progress.done), []
        for row, ids in enumerate(to_host(tokens)):
            ids = ids[ids != NO_TOKEN].tolist()
            if not ids:
                continue
            # What ends a text is not in it, even where it is no special token.
            text = streams[row].add(ids[:-1] if done[row] else ids) if streams else ""
            written[row].ids += ids
            if done[row]:
                written[row].reason = "end"
                written[row].end_token = tokenizer.id_to_token(ids[-1]) if tokenizer else ids[-1]
            elif streams and streams[row].is_stopped:
                written[row].reason = "stop"
            written[row].text += text
            pieces.append(Piece(row, ids, text))
        on_pieces(pieces)
        if all(text.reason != "length" for text in written):
            break
        done = np.array([x.reason != "length" for x in written])
        progress = jax.device_put(progress._replace(done=done), shardings)
    for row, stream in enumerate(streams):
        rest = stream.finish(is_continued=is_continued)
        written[row].text += rest
        on_pieces([Piece(row, [], rest)])
    return written, TextsSoFar(progress, [stream.state for stream in streams])


def _open_streams(
    model: LoadedModel,
    prompts: Sequence[Sequence[int]],
    options: WritingOptions,
    before: TextsSoFar | None,
) -> list[TextStream]:
    """Begins the text of each row behind its prompt; without a tokenizer there is none."""
    if not model.tokenizer:
        return []
    states = before.states if before else [None] * len(prompts)
    pairs = zip(prompts, states, strict=True)
    return [TextStream(model.tokenizer, ids, options.stops, state) for ids, state in pairs]


def _check_prompts(
    model: LoadedModel, prompts: Sequence[Sequence[int]], before: TextsSoFar | None
) -> None:
    vocab_size = (model.tokenizer or model.config.model).vocab_size
    for number, prompt in enumerate(prompts):
        unknown = [token for token in prompt if not 0 <= token < vocab_size]
        if unknown:
            raise ValueError(
                f"prompt {number} has the token id {unknown[0]}: the model knows ids from 0 to"
                f" {vocab_size - 1}"
            )
        if not prompt and before is None:
            raise ValueError(f"prompt {number} has no token: a text begins with at least one")


def _padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as an array of few possible lengths, so that few programs are compiled."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = max(1, int(lengths.max()))
    # At most an eighth is padding once prompts are long.
    step = max(16, 2 ** (longest.bit_length() - 3))
    tokens = np.zeros((len(prompts), math.ceil(longest / step) * step), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths
