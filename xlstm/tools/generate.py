r"""Lets a model continue prompts.

    bazel run //xlstm/tools:generate -- --checkpoint=runs/mine --prompt="def main("
    bazel run //xlstm/tools:generate -- --checkpoint=runs/mine --prompt_file=- --temperature=0.7 \
        --top_p=0.9 --stop="###" --json=texts.json < prompts.txt
    bazel run //xlstm/tools:generate -- --checkpoint=models/7b --prompt_ids=0,510,2565 \
        --output_ids --mesh=tp=8

Text goes to the standard output while it is written, everything else to the standard error. On a
terminal control characters in it are written out, as `\x1b`; into files and pipes goes what it is.
If the run keeps a moving average of the parameters, that is what writes.
"""

import codecs
import dataclasses
import json
import sys
import time

import jax
from absl import flags

from xlstm.files import write_atomically
from xlstm.inference.generate import (
    Piece,
    TextsSoFar,
    WritingOptions,
    Written,
    encode_prompt,
    write_texts,
)
from xlstm.inference.load_model import LoadedModel, load_model
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.state_file import load_progress, save_progress
from xlstm.tools.checkpoint_flags import checkpoint_path, note_nonfinite, use_checkpoint
from xlstm.tools.command_line import output_path, resolve_path, run
from xlstm.tools.processes import abort_all_on_failure, initialize_devices
from xlstm.trainer.base.multihost import from_first_process
from xlstm.visible_text import visible_lines

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt; may be given several times.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file with a prompt a line; - for the standard input."
)
_PROMPT_IDS = flags.DEFINE_multi_string(
    "prompt_ids", [], "A prompt as token ids, such as 0,17,4, taken as they are; several times."
)
_OUTPUT_IDS = flags.DEFINE_bool("output_ids", False, "Show token ids, a line a prompt.")
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 200, "Largest number of tokens behind each prompt.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "How many prompts are continued at once; with a state, all.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Divides the logits; 0 takes the likeliest token."
)
_TOP_K = flags.DEFINE_integer("top_k", 0, "Only so many of the likeliest tokens; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Only the likeliest tokens of this probability together.")
_MIN_P = flags.DEFINE_float(
    "min_p", 0.0, "Only tokens at least this times as likely as the likeliest."
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Makes tokens that have occurred less likely; 1 for none."
)
_STOP = flags.DEFINE_multi_string("stop", [], "A string that ends a text; several times.")
_SEED = flags.DEFINE_integer("seed", 0, "Decides what is sampled, below 2**32.", lower_bound=0)
_SAVE_STATE = flags.DEFINE_string("save_state", None, "File for the state behind the texts.")
_LOAD_STATE = flags.DEFINE_string(
    "load_state", None, "File of --save_state: the texts go on, each behind its prompt, if any."
)
_JSON = flags.DEFINE_string("json", None, "File for the texts, a list of objects.")


_NO_TOKENIZER = "the model came without a tokenizer: give --prompt_ids and --output_ids"


def split_prompts(content: bytes, name: str) -> list[str]:
    """Splits a file into its lines, of whatever system's ends, without a byte order mark.

    Args:
        content: The file: UTF-8, a prompt a line.
        name: What to call it in an error.

    Returns:
        The prompts; an empty line is an empty one.

    Raises:
        OSError: The file is empty or not UTF-8. (It is no ValueError, since all processes have to
            hear of it: see `from_first_process`.)
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise OSError(f"{name} looks like UTF-16: convert it to UTF-8, a prompt a line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(f"{name} is not UTF-8: {error}") from None
    if not text:
        raise OSError(f"{name} is empty: write a prompt a line")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n").split("\n")


def _read_prompts() -> list[str]:
    if not _PROMPT_FILE.value:
        return list(_PROMPT.value)
    if _PROMPT_FILE.value == "-":
        content = sys.stdin.buffer.read()
    else:
        with open(resolve_path(_PROMPT_FILE.value), "rb") as file:
            content = file.read()
    return [*_PROMPT.value, *split_prompts(content, f"--prompt_file={_PROMPT_FILE.value}")]


def _parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--prompt_ids={text}: expected whole numbers, such as 0,17,4") from None


def _prompts(model: LoadedModel, texts: list[str], before: TextsSoFar | None) -> list[list[int]]:
    """The ids of all prompts; a document without any begins with its marker alone."""
    has_ids = _PROMPT_IDS.value or before is not None
    if model.tokenizer is None and (texts or not has_ids):
        raise ValueError(_NO_TOKENIZER)
    if _PROMPT_IDS.value and texts:
        raise ValueError("prompts are given as text and as --prompt_ids: give them in one way")
    prompts = [_parse_ids(text) for text in _PROMPT_IDS.value]
    states = before.states if before else [None] * len(texts)
    if before is not None:
        rows = len(before.progress.done)
        num_prompts = len(prompts) + len(texts)
        if num_prompts not in (0, rows):
            raise ValueError(
                f"--load_state={_LOAD_STATE.value} has {rows} texts, and there are {num_prompts}"
                " prompts: give one for each, or none"
            )
        prompts = prompts or ([] if texts else [[]] * rows)
    pairs = zip(texts, states, strict=False)
    prompts += [encode_prompt(model, text, state) for text, state in pairs]
    return prompts or [encode_prompt(model, "")]


def _texts_of(model: LoadedModel, prompts: list[list[int]], before: TextsSoFar | None) -> list[str]:
    """The texts of prompts that were given as ids, up to their last whole character."""
    if model.tokenizer is None:
        return [""] * len(prompts)
    states = before.states if before else [None] * len(prompts)
    pairs = zip(prompts, states, strict=True)
    return [model.tokenizer.detokenizer(state).add(ids) for ids, state in pairs]


def _options(model: LoadedModel, *, token_by_token: bool) -> WritingOptions:
    if model.tokenizer is None and (_STOP.value or not _OUTPUT_IDS.value):
        raise ValueError(_NO_TOKENIZER)
    sampling = SamplingConfig(
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        min_p=_MIN_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        vocab_size=model.tokenizer.vocab_size if model.tokenizer else None,
    )
    stops = tuple(_STOP.value)
    return WritingOptions(_NUM_TOKENS.value, sampling, stops, _SEED.value, token_by_token)


class _Clock:
    """How fast tokens come."""

    def __init__(self):
        self._start, self._first, self._last = time.perf_counter(), None, None
        self._num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Takes note of tokens that have come; those that came first are not counted."""
        if not num_tokens:
            return
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        else:
            self._num_tokens += num_tokens

    def __str__(self) -> str:
        if self._first is None:
            return "no token was written"
        text = f"first tokens after {self._first - self._start:.1f} s"
        if not self._num_tokens:
            return text
        return f"{text}, then {self._num_tokens / (self._last - self._first):,.0f} a second"


def _shown(text: str) -> str:
    """A text as the standard output gets it: into files and pipes goes what it is."""
    return visible_lines(text) if sys.stdout.isatty() else text


def _show(number: int, num_prompts: int, prompt: str, written: Written) -> None:
    """Shows a text that is whole, among others."""
    if _OUTPUT_IDS.value:
        print(*written.ids, flush=True)
    else:
        title = f" {number + 1} of {num_prompts} "
        print(f"{title:─^80}\n{_shown(prompt + written.text)}", flush=True)


def write_all(
    model: LoadedModel, prompts: list[list[int]], texts: list[str], before: TextsSoFar | None
) -> tuple[list[Written], TextsSoFar]:
    """Continues all prompts as the flags say, and shows what comes.

    Args:
        model: The model.
        prompts: The ids of each prompt.
        texts: The text of each.
        before: How far the texts are that are continued, or None.

    Returns:
        What was written behind each prompt, and how far the texts of the last batch are then.
    """
    is_first = jax.process_index() == 0
    streams = len(prompts) == 1 and not _OUTPUT_IDS.value and is_first
    is_watched = streams and sys.stdout.isatty() and jax.process_count() == 1
    options, clock = _options(model, token_by_token=is_watched), _Clock()
    # What is saved, or was, is one batch.
    has_state = before is not None or _SAVE_STATE.value
    size = len(prompts) if has_state else _BATCH_SIZE.value
    if streams:
        print(_shown(texts[0]), end="", flush=True)

    def on_pieces(pieces: list[Piece]) -> None:
        clock.count(sum(len(piece.ids) for piece in pieces))
        if streams:
            print(_shown("".join(piece.text for piece in pieces)), end="", flush=True)

    all_written, progress = [], None
    for first in range(0, len(prompts), size):
        written, progress = write_texts(
            model,
            prompts[first : first + size],
            options,
            before=before,
            is_continued=bool(_SAVE_STATE.value),
            first_number=first,
            on_pieces=on_pieces,
        )
        if is_first and not streams:
            for row, text in enumerate(written, first):
                _show(row, len(prompts), texts[row], text)
        all_written += written
    if streams:
        print(flush=True)
    if is_first:
        for row, written in enumerate(all_written, 1):
            if written.end_token is not None:
                of = f" {row}" if len(prompts) > 1 else ""
                print(f"text{of} ended with the token {written.end_token!r}", file=sys.stderr)
        print(clock, file=sys.stderr)
    return all_written, progress


def _write_json(path: str, texts: list[str], all_written: list[Written]) -> None:
    pairs = zip(texts, all_written, strict=True)
    objects = [{"prompt": prompt} | dataclasses.asdict(written) for prompt, written in pairs]
    write_atomically(path, json.dumps(objects, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> None:
    """Generates as the flags say."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    path = checkpoint_path()
    json_path = output_path("json", _JSON.value)
    save_path = output_path("save_state", _SAVE_STATE.value)
    initialize_devices()
    with abort_all_on_failure():
        texts = from_first_process(_read_prompts)
        model = use_checkpoint(path, load_model)
        note_nonfinite(model.params)
        before = (
            load_progress(resolve_path(_LOAD_STATE.value), model) if _LOAD_STATE.value else None
        )
        prompts = _prompts(model, texts, before)
        if before or not texts:
            texts = _texts_of(model, prompts, before)
        all_written, progress = write_all(model, prompts, texts, before)
        if json_path and jax.process_index() == 0:
            _write_json(json_path, texts, all_written)
        if save_path:
            save_progress(save_path, progress, model)


if __name__ == "__main__":
    run(main)
