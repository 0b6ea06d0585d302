r"""Generates text that continues prompts.

    bazel run //xlstm/tools:generate -- --checkpoint=runs/mine --prompt="def main("
    bazel run //xlstm/tools:generate -- --checkpoint=runs/mine --prompt_file=- --temperature=0.7 \
        --top_p=0.9 --stop="###" --json=texts.json < prompts.txt
    bazel run //xlstm/tools:generate -- --checkpoint=models/7b --prompt_ids=0,510,2565 \
        --output_ids --mesh=tp=8

The text streams to standard output; everything else goes to standard error. A terminal shows
control characters escaped, as `\x1b`; files and pipes get the text unchanged. If the run keeps a
moving average of the parameters, the average is used.
"""

import codecs
import dataclasses
import json
import sys
import time

from absl import flags

from xlstm.tools.command_line import announce_start, output_path, resolve_path, run

if __name__ == "__main__":  # The other imports take seconds.
    announce_start("generate: loading JAX and the model code ...")

import jax

from xlstm.files import write_atomically
from xlstm.inference.generate import (
    Completion,
    GenerationConfig,
    GenerationState,
    TextChunk,
    encode_prompt,
    generate_text,
)
from xlstm.inference.load_model import load_run
from xlstm.inference.loaded_model import LoadedModel
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.state_file import load_state, save_state
from xlstm.tools.checkpoint_flags import (
    checkpoint_path,
    mesh_sizes,
    note_nonfinite,
    note_once,
)
from xlstm.tools.processes import abort_all_on_failure, initialize_devices
from xlstm.trainer.base.multihost import broadcast_from_process_0
from xlstm.visible_text import visible_lines

_PROMPT = flags.DEFINE_multi_string("prompt", [], "A prompt. Repeat the flag for several prompts.")
_PROMPT_FILE = flags.DEFINE_string(
    "prompt_file", None, "UTF-8 file with one prompt per line; - reads standard input."
)
_PROMPT_IDS = flags.DEFINE_multi_string(
    "prompt_ids",
    [],
    "A prompt as token ids, such as 0,17,4, used unchanged. Repeat the flag for several prompts.",
)
_OUTPUT_IDS = flags.DEFINE_bool(
    "output_ids", False, "Print token ids instead of text, one line per prompt."
)
_NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 200, "Largest number of tokens to generate after each prompt.", lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size",
    8,
    "Number of prompts to continue at once. With a saved state all prompts are one batch.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 1.0, "Divides the logits; 0 takes the most likely token."
)
_TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Sample from this number of the most likely tokens only; 0 disables."
)
_TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the smallest set of most likely tokens with this probability."
)
_MIN_P = flags.DEFINE_float(
    "min_p",
    0.0,
    "Sample from tokens that are at least this fraction as likely as the most likely one.",
)
_REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Makes tokens that have occurred less likely; 1 disables."
)
_STOP = flags.DEFINE_multi_string(
    "stop", [], "A string that ends a text. Repeat the flag for several strings."
)
_SEED = flags.DEFINE_integer("seed", 0, "Random seed for sampling, below 2**32.", lower_bound=0)
_SAVE_STATE = flags.DEFINE_string(
    "save_state", None, "File to write the state after the texts to, for --load_state."
)
_LOAD_STATE = flags.DEFINE_string(
    "load_state",
    None,
    "File that --save_state wrote: continue its texts, each with its prompt if there are prompts.",
)
_JSON = flags.DEFINE_string("json", None, "File to write the texts to, as a list of objects.")

_NO_TOKENIZER = "the model has no tokenizer: use --prompt_ids and --output_ids"


def split_prompts(content: bytes, name: str) -> list[str]:
    """Splits a file into its lines, with any line ends and without a byte order mark.

    Args:
        content: The content of the file: UTF-8, one prompt per line.
        name: The name of the file in error messages.

    Returns:
        The prompts; an empty line is an empty prompt.

    Raises:
        OSError: If the file is empty or not UTF-8; `broadcast_from_process_0` raises it in all
            processes.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise OSError(f"{name} looks like UTF-16: expected UTF-8, one prompt per line")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise OSError(f"{name} is not UTF-8: {error}") from None
    if not text:
        raise OSError(f"{name} is empty: expected one prompt per line")
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
        raise ValueError(f"--prompt_ids={text}: expected token ids, such as 0,17,4") from None


def _encode_prompts(
    model: LoadedModel, texts: list[str], state: GenerationState | None
) -> list[list[int]]:
    """Returns the ids of all prompts; without a prompt, of one empty document."""
    has_ids = _PROMPT_IDS.value or state is not None
    if model.tokenizer is None and (texts or not has_ids):
        raise ValueError(_NO_TOKENIZER)
    if _PROMPT_IDS.value and texts:
        raise ValueError("--prompt_ids cannot be combined with --prompt and --prompt_file")
    prompts = [_parse_ids(text) for text in _PROMPT_IDS.value]
    row_states = state.detokenizer_states if state else [None] * len(texts)
    if state is not None:
        batch_size = len(state.decode_state.done)
        num_prompts = len(prompts) + len(texts)
        if num_prompts not in (0, batch_size):
            raise ValueError(
                f"--load_state={_LOAD_STATE.value} has {batch_size} texts, but there are"
                f" {num_prompts} prompts: expected one for each text, or none"
            )
        prompts = prompts or ([] if texts else [[]] * batch_size)
    pairs = zip(texts, row_states, strict=False)
    prompts += [encode_prompt(model, text, row_state) for text, row_state in pairs]
    return prompts or [encode_prompt(model, "")]


def _decode_prompts(
    model: LoadedModel, prompts: list[list[int]], state: GenerationState | None
) -> list[str]:
    """Returns the texts of prompts that are ids, without an incomplete last character."""
    if model.tokenizer is None:
        return [""] * len(prompts)
    row_states = state.detokenizer_states if state else [None] * len(prompts)
    pairs = zip(prompts, row_states, strict=True)
    return [model.tokenizer.detokenizer(row_state).add(ids) for ids, row_state in pairs]


def _generation_config(model: LoadedModel, *, token_by_token: bool) -> GenerationConfig:
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
    stop_strings = tuple(_STOP.value)
    return GenerationConfig(_NUM_TOKENS.value, sampling, stop_strings, _SEED.value, token_by_token)


class _Speedometer:
    """Measures the time to the first tokens, and the speed after them."""

    def __init__(self):
        self._start, self._first, self._last = time.perf_counter(), None, None
        self._num_tokens = 0

    def count(self, num_tokens: int) -> None:
        """Counts new tokens; the first ones are not part of the speed."""
        if not num_tokens:
            return
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        else:
            self._num_tokens += num_tokens

    def __str__(self) -> str:
        if self._first is None:
            return "no tokens were generated"
        text = f"first tokens after {self._first - self._start:.1f} s"
        if not self._num_tokens:
            return text
        return f"{text}, then {self._num_tokens / (self._last - self._first):,.0f} tokens/s"


def _printable(text: str) -> str:
    """Returns a text for standard output: unchanged for files and pipes, escaped for a terminal."""
    return visible_lines(text) if sys.stdout.isatty() else text


def _print_completion(index: int, num_prompts: int, prompt: str, completion: Completion) -> None:
    """Prints one of several texts."""
    if _OUTPUT_IDS.value:
        print(*completion.ids, flush=True)
    else:
        title = f" {index + 1} of {num_prompts} "
        print(f"{title:─^80}\n{_printable(prompt + completion.text)}", flush=True)


def generate_and_print(
    model: LoadedModel, prompts: list[list[int]], texts: list[str], state: GenerationState | None
) -> tuple[list[Completion], GenerationState]:
    """Continues all prompts as the flags say, and prints the texts.

    Args:
        model: The model.
        prompts: The ids of each prompt.
        texts: The text of each prompt.
        state: The state of the texts that the prompts continue, or None.

    Returns:
        The completion of each prompt, and the state after the last batch.
    """
    is_first = jax.process_index() == 0
    streams = len(prompts) == 1 and not _OUTPUT_IDS.value and is_first
    is_watched = streams and sys.stdout.isatty() and jax.process_count() == 1
    config, speedometer = _generation_config(model, token_by_token=is_watched), _Speedometer()
    # A saved state holds one batch.
    has_state = state is not None or _SAVE_STATE.value
    size = len(prompts) if has_state else _BATCH_SIZE.value
    if streams:
        print(_printable(texts[0]), end="", flush=True)

    def on_chunks(chunks: list[TextChunk]) -> None:
        speedometer.count(sum(len(chunk.ids) for chunk in chunks))
        if streams:
            print(_printable("".join(chunk.text for chunk in chunks)), end="", flush=True)

    completions, last_state = [], None
    for first in range(0, len(prompts), size):
        batch, last_state = generate_text(
            model,
            prompts[first : first + size],
            config,
            state=state,
            is_continued=bool(_SAVE_STATE.value),
            first_index=first,
            on_chunks=on_chunks,
        )
        if is_first and not streams:
            for index, completion in enumerate(batch, first):
                _print_completion(index, len(prompts), texts[index], completion)
        completions += batch
    if streams:
        print(flush=True)
    if is_first:
        for index, completion in enumerate(completions, 1):
            if completion.end_token is not None:
                name = f"text {index}" if len(prompts) > 1 else "the text"
                print(f"{name} ended with the token {completion.end_token!r}", file=sys.stderr)
        print(speedometer, file=sys.stderr)
    return completions, last_state


def _write_json(path: str, texts: list[str], completions: list[Completion]) -> None:
    pairs = zip(texts, completions, strict=True)
    objects = [{"prompt": prompt} | dataclasses.asdict(completion) for prompt, completion in pairs]
    write_atomically(path, json.dumps(objects, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str]) -> None:
    """Generates text as the flags say."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    path = checkpoint_path()
    json_path = output_path("json", _JSON.value)
    save_path = output_path("save_state", _SAVE_STATE.value)
    initialize_devices()
    with abort_all_on_failure():
        texts = broadcast_from_process_0(_read_prompts)
        model = load_run(path, mesh=mesh_sizes(), report=note_once)
        note_nonfinite(model.params)
        state = load_state(resolve_path(_LOAD_STATE.value), model) if _LOAD_STATE.value else None
        prompts = _encode_prompts(model, texts, state)
        if state or not texts:
            texts = _decode_prompts(model, prompts, state)
        completions, last_state = generate_and_print(model, prompts, texts, state)
        if json_path and jax.process_index() == 0:
            _write_json(json_path, texts, completions)
        if save_path:
            save_state(save_path, last_state, model)


if __name__ == "__main__":
    run(main)
