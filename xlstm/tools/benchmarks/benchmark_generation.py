"""Times prefilling and decoding, with random parameters of a config's model.

    bazel run //xlstm/tools:benchmark_generation -- --config.model.embedding_dim=256 \
        --batch_sizes=1,8 --prompt_lengths=512,100000

Each figure is compared with the best that the machine can do, measured in alternation: prefilling
with the rate of a large dense matmul, decoding with one product by a square matrix that has as many
elements as the model has parameters.
"""

import functools
import json
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xlstm.common_types import PyTree
from xlstm.files import write_atomically
from xlstm.inference.decode import (
    DecodeState,
    decode,
    init_decode_state,
    prefill,
    prefill_step,
    row_keys,
)
from xlstm.inference.sampling import SamplingConfig
from xlstm.models.shared.precision import product_precision
from xlstm.models.xlstm_parallel.blocks.mlstm.describe import mlstm_line
from xlstm.models.xlstm_parallel.config import LanguageModelConfig
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.tools.command_line import output_path, run
from xlstm.tools.config import define_config_flags, run_config
from xlstm.trainer.base.param_utils import get_num_params, unboxed
from xlstm.trainer.base.throughput import measure_matmul_rate

_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Numbers of prompts in a batch.")
_PROMPT_LENGTHS = flags.DEFINE_list("prompt_lengths", ["512"], "Numbers of tokens of a prompt.")
_REPEATS = flags.DEFINE_integer(
    "repeats", 10, "Number of timed repeats of each measurement.", lower_bound=1
)
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as a list of objects.")

_NUM_TOKENS = 32  # Decoded per repeat.
_PREFILL_SECONDS = 5.0  # No further repeats of prefilling after this time: long prompts are slow.


def _sizes(name: str, values: list[str]) -> list[int]:
    if not all(value.isdigit() and int(value) for value in values):
        raise ValueError(f"--{name}={','.join(values)}: expected whole numbers of at least 1")
    return [int(value) for value in values]


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Calls a function; returns the seconds that it took and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - start, result


def time_generation(
    config: LanguageModelConfig, params: PyTree, batch_size: int, prompt_length: int, repeats: int
) -> dict[str, float]:
    """Times prefilling prompts of one length, and decoding after them.

    Args:
        config: Configuration of the model.
        params: Its parameters.
        batch_size: Number of prompts in the batch.
        prompt_length: Number of tokens of each prompt.
        repeats: Number of timed repeats.

    Returns:
        The figures, medians over the repeats; their keys name the units.
    """
    model, num_params = config.model, get_num_params(params)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.vocab_size, (batch_size, prompt_length), np.int32)
    prompts, keys = jnp.asarray(prompts), row_keys(jax.random.PRNGKey(0), range(batch_size))
    size = math.isqrt(num_params)
    matrix = jax.random.normal(jax.random.key(0), (size, size), model.compute_dtype)
    precision = product_precision(model.precision, matrix)
    product = jax.jit(functools.partial(jnp.dot, precision=precision))
    row = matrix[:batch_size]

    def decode_some(decode_state: DecodeState) -> DecodeState:
        return decode_compiled(params, decode_state, keys, _NUM_TOKENS)[0]

    compile_prefill = prefill_step.lower(params, prompts, config=config).compile
    prefill_compile, prefill_compiled = _timed(compile_prefill)
    prefill_all = functools.partial(prefill_compiled, params, prompts)
    decode_state = prefill(params, init_decode_state(config, batch_size), prompts, config=config)
    options = {"config": config, "sampling": SamplingConfig(temperature=0.0)}
    compile_decode = decode.lower(
        params, decode_state, keys, _NUM_TOKENS, **options, max_tokens=_NUM_TOKENS
    ).compile
    decode_compile, decode_compiled = _timed(compile_decode)
    decode_state = decode_some(decode_state)
    jax.block_until_ready((prefill_all(), decode_state, product(row, matrix)))
    prefill_times, figures = [], []
    for _ in range(repeats):
        rate = measure_matmul_rate(model.compute_dtype, model.precision, seconds=0.1)
        if sum(prefill_times) < _PREFILL_SECONDS:
            prefill_times.append(_timed(prefill_all)[0])
        decode_time, decode_state = _timed(functools.partial(decode_some, decode_state))
        product_time = min(_timed(functools.partial(product, row, matrix))[0] for _ in range(5))
        figures.append((rate, decode_time / _NUM_TOKENS, product_time))
    rates, token_times, product_times = np.array(figures).T
    # The head computes logits of the last token of a prompt only.
    head = 2 * model.embedding_dim * model.vocab_size
    operations = count_flops_per_token(config, prompt_length) / 3 - head
    prefill_rates = operations * batch_size * prompt_length / np.array(prefill_times)
    return {
        "batch_size": batch_size,
        "prompt_length": prompt_length,
        "parameters": num_params,
        "matmul_rate_gflop_per_s": float(np.median(rates)) / 1e9,
        "prefill_compile_s": prefill_compile,
        "prefill_ms": float(np.median(prefill_times)) * 1e3,
        "prefill_matmul_fraction": float(np.median(prefill_rates / rates[: len(prefill_rates)])),
        "decode_compile_s": decode_compile,
        "decode_step_ms": float(np.median(token_times)) * 1e3,
        "decode_tokens_per_s": batch_size / float(np.median(token_times)),
        "decode_product_fraction": float(np.median(product_times / token_times)),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    title = f"{rows[0]['parameters']:,} parameters on {rows[0]['device']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    columns = ("batch\nsize", "prompt\ntokens", "matmul\nGFLOP/s", "prefill\nms", "of\nmatmul")
    columns += ("decode\nms/token", "decode\ntokens/s", "of\nproduct", "compile\ns")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['batch_size']}",
            f"{row['prompt_length']:,}",
            f"{row['matmul_rate_gflop_per_s']:,.0f}",
            f"{row['prefill_ms']:,.1f}",
            f"{row['prefill_matmul_fraction']:.0%}",
            f"{row['decode_step_ms']:.2f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            f"{row['decode_product_fraction']:.0%}",
            f"{row['prefill_compile_s']:.1f} + {row['decode_compile_s']:.1f}",
        )
    return table


def main(argv: list[str]) -> None:
    """Times what the flags select, prints a table, and writes the results to a file."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config().language_model
    batch_sizes = _sizes("batch_sizes", _BATCH_SIZES.value)
    prompt_lengths = _sizes("prompt_lengths", _PROMPT_LENGTHS.value)
    json_path = output_path("json", _JSON.value)
    program = mlstm_line(config, jax.devices()[0])
    init = jax.jit(xLSTMLMModel(config).init)
    params = unboxed(init(jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))["params"])
    cases = [(batch, length) for batch in batch_sizes for length in prompt_lengths]
    rows = []
    for case in track(cases, "timing", console=Console(stderr=True), auto_refresh=False):
        figures = time_generation(config, params, *case, _REPEATS.value)
        rows.append({"device": jax.devices()[0].device_kind, "program": program} | figures)
    if json_path:
        write_atomically(json_path, json.dumps(rows, indent=2) + "\n")
    if program:
        Console().print(program, highlight=False, soft_wrap=True)
    Console().print(_table(rows))


if __name__ == "__main__":
    run(main, define_config_flags)
