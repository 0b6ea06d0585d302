"""Times mLSTM backends side by side."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlstm.tools.benchmarks.candidates import Candidate, Shape
from xlstm.tools.benchmarks.timed import PASSES, TimedFunction
from xlstm.trainer.base.throughput import measure_matmul_rate

FORGET_GATE_BIAS = 4.0  # Between the biases of the first and the last head of a new model.
_MATMUL_INTERVAL = 2.0  # Seconds; a measurement takes a quarter of a second.
# Calls in a timed run. Starting a call on an accelerator and waiting for it takes 0.1 ms.
_CALLS, _CALLS_ON_CPU = 3, 1


def random_inputs(shape: Shape, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Returns inputs as in a new model: gates near their biases, everything else normal.

    Args:
        shape: The sizes; `N = B * NH`.
        dtype: Dtype of all inputs except the gates, which are float32.

    Returns:
        `q, k (N, T, DHQK)`, `v (N, T, DHV)`, `i, f (N, T)`, and a cotangent of `h`, `(N, T, DHV)`;
        deterministic for a shape. Axes `(B, NH, T)` would cost copies: the kernels for GPUs expect
        that such arrays are transposed views of `(B, T, NH)`, as in a layer.
    """
    rng = np.random.default_rng(0)
    batch, num_heads, length, qk_dim, v_dim = shape

    def draw(*features: int) -> np.ndarray:
        return rng.standard_normal((batch * num_heads, length, *features), np.float32)

    q, k, v, i, f, dh = draw(qk_dim), draw(qk_dim), draw(v_dim), draw(), draw(), draw(v_dim)
    q, k, v, dh = (jnp.asarray(x, dtype) for x in (q, k, v, dh))
    return q, k, v, jnp.asarray(i), jnp.asarray(f + FORGET_GATE_BIAS), dh


def time_candidates(
    shape: Shape,
    candidates: Sequence[Candidate],
    dtype: jnp.dtype,
    repeats: int,
    advance: Callable[[], None],
    precision: lax.Precision | None = None,
    on_failure: Callable[[Candidate, Exception], None] | None = None,
) -> list[dict[str, Any]]:
    """Compiles all candidates, then runs them in turn, repeatedly.

    Alternating makes a drift of the machine's speed affect all candidates equally.

    Args:
        shape: The sizes of the inputs.
        candidates: The candidates to compare, at least one.
        dtype: Dtype of `q`, `k` and `v`; the gates are float32.
        repeats: Number of timed runs of each candidate.
        advance: Called after each compilation and each timed run.
        precision: The precision with which the dense matmul multiplies float32.
        on_failure: Called with a candidate that cannot be compiled or run, and with its error; the
            candidate is left out. None raises the error.

    Returns:
        A row for each candidate; its keys name the units. Fractions are useful operations per
        second over the rate of a large dense matmul; ratios are times over the first candidate's.

    Raises:
        ValueError: If an external function fails.
    """
    inputs = random_inputs(shape, dtype)
    calls = _CALLS_ON_CPU if jax.default_backend() == "cpu" else _CALLS
    timed: list[tuple[Candidate, dict[str, TimedFunction]]] = []
    for candidate in candidates:
        functions = {}
        try:
            for name, function in candidate.timed_passes(inputs):
                functions[name] = function
                advance()
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(candidate, error)
            continue
        timed.append((candidate, functions))

    rates, last_measured = [], -np.inf
    for _ in range(repeats):
        if time.perf_counter() - last_measured > _MATMUL_INTERVAL:
            rates.append(_matmul_rate(dtype, precision))
            last_measured = time.perf_counter()
        for _, functions in timed:
            for function in functions.values():
                function.run(calls)
                advance()
    rate = float(np.median([*rates, _matmul_rate(dtype, precision)]))

    rows: list[dict[str, Any]] = []
    for candidate, functions in timed:
        row = {
            "shape": str(shape),
            "dtype": jnp.dtype(dtype).name,
            "backend": candidate.name,
            "implementation": candidate.implementation,
            "chunk_size": candidate.chunk_size,
            "options": candidate.options,
            "matmul_rate_gflop_per_s": rate / 1e9,
        }
        operations = candidate.forward_operations(shape)
        for name, function in functions.items():
            median = float(np.median(function.times))
            row[f"{name}_median_ms"] = median * 1e3
            row[f"{name}_min_ms"] = min(function.times) * 1e3
            row[f"{name}_compile_s"] = function.compile_time
            row[f"{name}_temporary_memory_mib"] = function.temporary_memory / 2**20
            row[f"{name}_matmul_fraction"] = PASSES[name] * operations / median / rate
            first = (rows or [row])[0][f"{name}_median_ms"]
            row[f"{name}_ratio_to_first"] = row[f"{name}_median_ms"] / first
        rows.append(row)
    return rows


def _matmul_rate(dtype: jnp.dtype, precision: lax.Precision | None) -> float:
    """Returns the rate of one device, on which the candidates run, in FLOP/s."""
    num_devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return measure_matmul_rate(dtype, precision, seconds=0.0) / num_devices
