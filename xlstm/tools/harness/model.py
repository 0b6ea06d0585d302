"""The model class `xlstm` of EleutherAI's lm-evaluation-harness: the model of a run.

    results = lm_eval.simple_evaluate(RunLM("runs/mine", batch_size=8), tasks=["lambada_openai"])

`lm_eval_command.py` is the command.
"""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from xlstm.distributed.mesh import MESH_AXES
from xlstm.inference.generate import GenerationConfig, generate_text
from xlstm.inference.load_model import load_run
from xlstm.inference.sampling import SamplingConfig
from xlstm.inference.score import Score, score
from xlstm.trainer.base.param_utils import count_nonfinite, get_num_params, nonfinite_text

_LOGGER = logging.getLogger("lm_eval.xlstm")
_ARGUMENTS = ("checkpoint", "add_bos_token", "max_length", "max_gen_toks")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("xlstm")
class RunLM(TemplateLM):
    """The model of a run's checkpoint, for the harness.

    Attributes:
        run: The model.
        batch_size: The number of rows at once.
        add_bos_token: Whether contexts begin with the marker before documents.
        max_length: The largest number of tokens that the model reads for one prediction; None for
            no limit.
        max_gen_toks: The largest number of tokens to generate, unless a task names another.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        batch_size: int | str = 1,
        add_bos_token: bool = True,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        max_batch_size: int | None = None,
        **mesh: int,
    ):
        """Loads a model; the harness hands over `--model_args` and `--batch_size`.

        Args:
            checkpoint: The folder of a run, or of one of its checkpoints.
            batch_size: The number of rows at once.
            add_bos_token: Whether contexts begin with the marker before documents, as in training.
            max_length: The largest number of tokens that the model reads for one prediction, as in
                the harness's class `hf`; None for no limit.
            max_gen_toks: The largest number of tokens to generate, unless a task names another.
            device: Ignored: JAX chooses the devices, see the environment variable JAX_PLATFORMS.
            max_batch_size: Ignored: `batch_size` is never found out.
            **mesh: Sizes of mesh axes, see `load_run`.

        Raises:
            ValueError: If an argument is invalid, or the run has no tokenizer.
            OSError: If the checkpoint cannot be read.
        """
        super().__init__()
        if jax.process_count() > 1:
            raise ValueError(f"lm_eval runs in one process: there are {jax.process_count()}")
        unknown = [name for name in mesh if name not in MESH_AXES]
        if unknown:
            expected = ", ".join((*_ARGUMENTS, *MESH_AXES))
            raise ValueError(f"model_args has {unknown[0]!r}: expected arguments among {expected}")
        if not checkpoint:
            raise ValueError("model_args has no checkpoint: expected checkpoint=FOLDER of a run")
        if not isinstance(add_bos_token, bool):
            raise ValueError(f"add_bos_token={add_bos_token!r}: expected True or False")
        self.batch_size = _to_size("batch_size", batch_size)
        self.add_bos_token = add_bos_token
        self.max_length = None if max_length is None else _to_size("max_length", max_length)
        self.max_gen_toks = _to_size("max_gen_toks", max_gen_toks)
        sizes = {axis: _to_size(axis, size) for axis, size in mesh.items()}
        self.run = load_run(str(checkpoint), mesh=sizes, report=_LOGGER.warning)
        if self.run.tokenizer is None:
            raise ValueError(f"the model in {self.run.workdir.path} has no tokenizer")
        if counts := count_nonfinite(self.run.params):
            _LOGGER.warning(nonfinite_text(counts))

    @property
    def eot_token_id(self) -> int:
        """The id of the marker after documents."""
        return self.run.tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the marker before documents, the context of a text without one."""
        return self.run.tokenizer.bos_id

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the harness's results say about the model."""
        return {
            "model_num_parameters": get_num_params(self.run.params),
            "model_dtype": self.run.config.model.dtype,
            "model_step": self.run.step,
            "model_fingerprint": self.run.fingerprint,
        }

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Raises ValueError if a chat template is asked for: runs have none."""
        if chat_template:
            raise ValueError("--apply_chat_template: the model of a run has no chat template")
        return None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, after the marker if `add_bos_token` is set."""
        has_bos = self.add_bos_token if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id] * has_bos + self.run.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        def report(index: int, result: Score) -> None:
            progress.update()
            self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(result))

        # A context of spaces alone has no tokens: `_encode_pair` moves them to the continuation.
        pairs = [(context or [self.prefix_token_id], rest) for _, context, rest in requests]
        with _progress("loglikelihood", len(requests), disable_tqdm) as progress:
            return [tuple(result) for result in self._score(pairs, report)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns the log-likelihood of each text as a document of its own."""
        pairs, owners = [], []
        for index, request in enumerate(requests):
            windows = self._windows(self.tok_encode(request.args[0], add_special_tokens=False))
            pairs += windows
            owners += [index] * len(windows)
        totals, missing = [0.0] * len(requests), [owners.count(i) for i in range(len(requests))]

        def report(pair: int, result: Score) -> None:
            progress.update()
            index = owners[pair]
            totals[index] += result.log_likelihood
            missing[index] -= 1
            if not missing[index]:
                text = requests[index].args[0]
                self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[index])

        with _progress("loglikelihood_rolling", len(pairs), disable_tqdm) as progress:
            self._score(pairs, report)
        return totals

    def _windows(self, ids: list[int]) -> list[tuple[list[int], list[int]]]:
        """Returns contexts and continuations that together are a document."""
        if self.max_length is None:
            return [([self.prefix_token_id], ids)]
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _score(
        self, pairs: list[tuple[list[int], list[int]]], report: Callable[[int, Score], None]
    ) -> list[Score]:
        contexts = [self._truncated(context, len(rest)) for context, rest in pairs]
        continuations = [rest for _, rest in pairs]
        return score(self.run, contexts, continuations, batch_size=self.batch_size, on_score=report)

    def _truncated(self, context: list[int], num_more: int) -> list[int]:
        """Returns the end of a context that, with more tokens, has at most `max_length + 1`."""
        if self.max_length is None:
            return context
        if num_more > self.max_length:
            raise ValueError(
                f"max_length={self.max_length}: it is less than the {num_more} tokens of a request"
            )
        return context[-(self.max_length + 1 - num_more) :]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the text that continues each context, up to a stop string."""
        # `--seed` sets the state of numpy's generator.
        seed = int(np.random.randint(2**31))  # noqa: NPY002
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        with _progress("generate_until", len(requests), disable_tqdm) as progress:
            for indices in groups.values():
                config = self._generation_config(requests[indices[0]].args[1], seed)
                encode = functools.partial(self._prompt, num_more=config.max_tokens)
                prompts = {index: encode(requests[index].args[0]) for index in indices}
                indices.sort(key=lambda index, prompts=prompts: -len(prompts[index]))
                for first in range(0, len(indices), self.batch_size):
                    batch = indices[first : first + self.batch_size]
                    rows = [prompts[index] for index in batch]
                    completions, _ = generate_text(self.run, rows, config, first_index=first)
                    for index, completion in zip(batch, completions, strict=True):
                        texts[index] = completion.text
                        arguments = requests[index].args
                        self.cache_hook.add_partial("generate_until", arguments, completion.text)
                        progress.update()
        return texts

    def _prompt(self, text: str, num_more: int) -> list[int]:
        # `hf` keeps this many tokens too.
        return self._truncated(self.tok_encode(text) or [self.prefix_token_id], num_more + 1)

    def _generation_config(self, arguments: dict[str, Any], seed: int) -> GenerationConfig:
        options = dict(normalize_gen_kwargs(arguments, self.max_gen_toks))
        options.pop("do_sample")  # Without it, the temperature is 0 now.
        stop_strings, max_tokens = options.pop("until"), options.pop("max_gen_toks")
        unknown = [name for name in options if name not in _SAMPLING]
        if unknown:
            expected = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING))
            raise ValueError(
                f"generation_kwargs has {unknown[0]!r}: expected arguments among {expected}"
            )
        sampling = {"temperature": 0.0, "vocab_size": self.run.tokenizer.vocab_size} | options
        stops = tuple(stop for stop in stop_strings if stop)
        return GenerationConfig(max_tokens, SamplingConfig(**sampling), stops, seed)


def _to_size(name: str, value: Any) -> int:
    """Returns a positive number that the command line has as a number or a text."""
    if value == "auto" or str(value).startswith("auto:"):
        raise ValueError(
            f"{name}={value}: expected a number; the memory of a row does not depend on its length"
        )
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value}: expected a positive number")
    return int(value)


def _progress(kind: str, total: int, is_disabled: bool) -> tqdm:
    return tqdm(total=total, desc=f"Running {kind} requests", disable=is_disabled)
