"""Times the training step of a config."""

import resource
import time
from collections.abc import Callable

import jax
import numpy as np

from xlstm.dataset.batch import Batch
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.trainer.base.param_utils import get_num_params
from xlstm.trainer.base.throughput import measure_matmul_rate
from xlstm.trainer.callbacks.metrics import peak_device_bytes
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh, global_batches
from xlstm.trainer.llm.language_model import create_training


def random_batch(config: RunConfig) -> Batch:
    """Returns a batch of random tokens, with some resets, for a config."""
    rng = np.random.default_rng(0)
    shape = (config.data.batch_size, config.data.context_length)
    tokens = rng.integers(0, config.model.vocab_size, (shape[0], shape[1] + 1), np.int32)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        targets_mask=np.ones(shape, bool),
        reset=rng.random(shape) < 1e-3,
    )


def time_train_step(
    config: RunConfig, repeats: int, advance: Callable[[], None]
) -> dict[str, float]:
    """Compiles and times a training step.

    The data are random tokens, so the figures exclude reading data. Since a machine's speed drifts,
    the rate of a large dense matmul, with the model's precision, is measured before every step.

    Args:
        config: Model, mesh, batch and optimizer.
        repeats: Number of timed steps.
        advance: Called after the compilation and each timed step.

    Returns:
        The figures; their keys name the units. The peak memory of the device is included if the
        device reports it; it covers the process up to the first step, without the matmul.
    """
    mesh = create_run_mesh(config)
    state, _, train_step = create_training(config, mesh)
    (batch,) = global_batches([random_batch(config)], mesh)
    begin = time.perf_counter()
    compiled = train_step.lower(state, batch).compile()
    compile_time = time.perf_counter() - begin
    num_params = get_num_params(state.params)
    flops = count_flops_per_token(config.language_model, config.data.context_length)

    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics)
    peak = peak_device_bytes()
    advance()
    rates, times = [], []
    for _ in range(repeats):
        rates.append(
            measure_matmul_rate(config.model.compute_dtype, config.model.precision, seconds=0.2)
        )
        begin = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - begin)
        advance()

    median = float(np.median(times))
    tokens = config.data.batch_size * config.data.context_length
    fractions = flops * tokens / np.asarray(times) / np.asarray(rates)
    figures = {
        "parameters": num_params,
        "compile_s": compile_time,
        "step_median_ms": median * 1e3,
        "step_min_ms": min(times) * 1e3,
        "tokens_per_s": tokens / median,
        "matmul_rate_gflop_per_s": float(np.median(rates)) / 1e9,
        "matmul_fraction": float(np.median(fractions)),
        "temporary_memory_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "peak_resident_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }
    return figures if peak is None else figures | {"peak_device_memory_mib": peak / 2**20}
