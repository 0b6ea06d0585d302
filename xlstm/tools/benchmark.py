"""Times the training step of a config: `bazel run //xlstm/tools:benchmark -- --config=NAME`.

The rate of a large dense matmul is measured in the same process, beside every step, since a
machine's speed drifts. Data are random tokens: reading them is not part of the figure.
"""

import resource
import time

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from xlstm.dataset.batch import Batch
from xlstm.tools.command_line import run
from xlstm.tools.config import to_run_config
from xlstm.tools.config_flag import config_name, define_config_flag, with_config_paths
from xlstm.tools.processes import initialize_devices
from xlstm.trainer.base.param_utils import get_num_params
from xlstm.trainer.base.throughput import measure_matmul_rate
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh, global_batches
from xlstm.trainer.llm.train import create_language_model_run

_CONFIG = define_config_flag()
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps.", lower_bound=1)


def _random_batch(config: RunConfig) -> Batch:
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.context_length)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        targets_mask=np.ones(shape, bool),
        reset=rng.random(shape) < 1e-3,
    )


def time_train_step(config: RunConfig, repeats: int) -> dict[str, float]:
    """Compiles and times a training step.

    Args:
        config: Model, mesh, batch and optimizer.
        repeats: Number of timed steps.

    Returns:
        Times in seconds, memory in bytes, rates in tokens or floating-point operations a second.
        Useful operations are counted as 6 for each parameter and token.
    """
    mesh = create_run_mesh(config)
    state, _, train_step = create_language_model_run(config, mesh)
    (batch,) = global_batches([_random_batch(config)], mesh)
    begin = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    compile_time = time.perf_counter() - begin
    num_params = get_num_params(state.params)

    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    rates, times = [], []
    for _ in range(repeats):
        rates.append(measure_matmul_rate(config.model.compute_dtype, seconds=0.2))
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begin)

    median = float(np.median(times))
    tokens = config.data.batch_size * config.data.context_length
    fractions = 6 * num_params * tokens / np.asarray(times) / np.asarray(rates)
    return {
        "num_params": num_params,
        "compile_time": compile_time,
        "step_time_median": median,
        "step_time_min": min(times),
        "tokens_per_second": tokens / median,
        "matmul_rate": float(np.median(rates)),
        "matmul_fraction": float(np.median(fractions)),
        "temporary_memory": compiled.memory_analysis().temp_size_in_bytes,
        "resident_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(argv: list[str]) -> None:
    """Prints the figures of the config that the flags choose."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = to_run_config(_CONFIG.value)
    initialize_devices()
    figures = time_train_step(config, _REPEATS.value)
    table = Table(title=f"training step of {config_name()} on {jax.devices()[0].device_kind}")
    for column, justify in (("figure", "left"), ("value", "right")):
        table.add_column(column, justify=justify)
    for name, value, unit in (
        ("parameters", f"{figures['num_params']:,}", ""),
        ("compile time", f"{figures['compile_time']:.1f}", "s"),
        ("step, median", f"{figures['step_time_median'] * 1e3:.1f}", "ms"),
        ("step, fastest", f"{figures['step_time_min'] * 1e3:.1f}", "ms"),
        ("speed", f"{figures['tokens_per_second']:,.0f}", "tokens/s"),
        ("dense matmul", f"{figures['matmul_rate'] / 1e9:,.0f}", "GFLOP/s"),
        ("fraction of the dense matmul", f"{figures['matmul_fraction']:.1%}", ""),
        ("temporary memory of the step", f"{figures['temporary_memory'] / 2**20:,.0f}", "MiB"),
        ("peak resident memory", f"{figures['resident_memory'] / 2**20:,.0f}", "MiB"),
    ):
        table.add_row(name, f"{value} {unit}".strip())
    Console().print(table)


if __name__ == "__main__":
    run(main, with_config_paths)
