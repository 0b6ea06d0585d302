"""Times mLSTM backends side by side."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xlstm.tools.benchmarks.candidates import Candidate, Shape
from xlstm.trainer.base.throughput import measure_matmul_rate

FORGET_GATE_BIAS = 4.0  # Between the biases of the first and the last head of a new model.
_MATMUL_INTERVAL = 2.0  # Seconds; a measurement takes a quarter of a second.

# Useful operations of each pass, in multiples of the forward pass.
PASSES = {"forward": 1, "forward_backward": 3}


class _TimedFunction:
    """A compiled function with the seconds of its compilation and of its runs."""

    def __init__(self, function: Callable, arguments: Sequence[jax.Array]):
        jax.clear_caches()  # Otherwise a function may reuse the traces of another.
        begin = time.perf_counter()
        self._compiled = jax.jit(function).lower(*arguments).compile()
        self.compile_time = time.perf_counter() - begin
        self.temporary_memory = self._compiled.memory_analysis().temp_size_in_bytes
        self._arguments = arguments
        self.times: list[float] = []
        jax.block_until_ready(self._compiled(*arguments))  # The first run warms up.

    def run(self) -> None:
        """Runs the function and records the time."""
        begin = time.perf_counter()
        jax.block_until_ready(self._compiled(*self._arguments))
        self.times.append(time.perf_counter() - begin)


def random_inputs(shape: Shape, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
    """Returns inputs as in a new model: gates near their biases, everything else normal.

    Args:
        shape: The sizes.
        dtype: Dtype of all inputs except the gates, which are float32.

    Returns:
        `q, k (B, NH, T, DHQK)`, `v (B, NH, T, DHV)`, `i, f (B, NH, T)`, and a cotangent of `h`,
        `(B, NH, T, DHV)`; deterministic for a shape.
    """
    rng = np.random.default_rng(0)
    *tokens, qk_dim, v_dim = shape

    def draw(*features: int) -> np.ndarray:
        return rng.standard_normal((*tokens, *features), np.float32)

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

    Returns:
        A row for each candidate; its keys name the units. Fractions are useful operations per
        second over the rate of a large dense matmul; ratios are times over the first candidate's.

    Raises:
        ValueError: If an external function fails.
    """
    inputs = random_inputs(shape, dtype)
    timed = []
    for candidate in candidates:
        functions = {}
        for name, function in _passes(candidate.function).items():
            functions[name] = _TimedFunction(function, inputs)
            advance()
        timed.append(functions)

    rates, last_measured = [], -np.inf
    for _ in range(repeats):
        if time.perf_counter() - last_measured > _MATMUL_INTERVAL:
            rates.append(_matmul_rate(dtype, precision))
            last_measured = time.perf_counter()
        for functions in timed:
            for function in functions.values():
                function.run()
                advance()
    rate = float(np.median([*rates, _matmul_rate(dtype, precision)]))

    rows: list[dict[str, Any]] = []
    for candidate, functions in zip(candidates, timed, strict=True):
        row = {
            "shape": str(shape),
            "dtype": jnp.dtype(dtype).name,
            "backend": candidate.name,
            "chunk_size": candidate.tokens_per_chunk(shape),
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


def _passes(function: Callable[..., jax.Array]) -> dict[str, Callable]:
    """Returns the functions to time; each takes the inputs and the cotangent."""

    def forward(q, k, v, i, f, dh):
        del dh
        return function(q, k, v, i, f)

    def loss(q, k, v, i, f, dh):
        return jnp.sum(function(q, k, v, i, f).astype(jnp.float32) * dh)

    functions = forward, jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    return dict(zip(PASSES, functions, strict=True))


def _matmul_rate(dtype: jnp.dtype, precision: lax.Precision | None) -> float:
    """Returns the rate of one device, on which the candidates run, in FLOP/s."""
    num_devices = 1 if jax.default_backend() == "cpu" else jax.device_count()
    return measure_matmul_rate(dtype, precision, seconds=0.0) / num_devices
