"""Functions that benchmarks time, with the cost of their preparation."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Useful operations of each pass, in multiples of the forward pass.
PASSES = {"forward": 1, "forward_backward": 3}


class TimedFunction:
    """A prepared function and the seconds of its runs.

    Attributes:
        compile_time: Seconds of the preparation.
        temporary_memory: Bytes that a call needs beside its arguments and results.
        times: Seconds of a call, of each run.
    """

    def __init__(
        self,
        call: Callable[[], Any],
        wait: Callable[[Any], Any],
        compile_time: float,
        temporary_memory: int,
    ):
        """Stores the function.

        Args:
            call: Starts a call and returns its results, which may not be ready.
            wait: Waits until the results of a call, and of all calls before it, are ready.
            compile_time: See the class.
            temporary_memory: See the class.
        """
        self._call, self._wait = call, wait
        self.compile_time, self.temporary_memory = compile_time, temporary_memory
        self.times: list[float] = []

    def run(self, calls: int = 1) -> None:
        """Calls the function some times in a row, and records the mean time of a call."""
        begin = time.perf_counter()
        for _ in range(calls):
            results = self._call()
        self._wait(results)
        self.times.append((time.perf_counter() - begin) / calls)


def compile_passes(
    function: Callable[..., jax.Array], inputs: Sequence[jax.Array]
) -> Iterator[tuple[str, TimedFunction]]:
    """Compiles the passes of an mLSTM, and runs each once.

    Args:
        function: Maps `q, k, v, i, f` to `h`.
        inputs: `q, k, v, i, f` and a cotangent of `h`.

    Yields:
        The names of `PASSES`, and the compiled passes.
    """

    def forward(q, k, v, i, f, dh):
        del dh
        return function(q, k, v, i, f)

    def loss(q, k, v, i, f, dh):
        return jnp.sum(function(q, k, v, i, f).astype(jnp.float32) * dh)

    backward = jax.grad(loss, argnums=(0, 1, 2, 3, 4))
    for name, function_of_pass in zip(PASSES, (forward, backward), strict=True):
        yield name, _compile(function_of_pass, inputs)


def _compile(function: Callable, arguments: Sequence[jax.Array]) -> TimedFunction:
    jax.clear_caches()  # Otherwise a function may reuse the traces of another.
    begin = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_time = time.perf_counter() - begin
    jax.block_until_ready(compiled(*arguments))  # The first run warms up.
    memory = compiled.memory_analysis().temp_size_in_bytes
    return TimedFunction(lambda: compiled(*arguments), jax.block_until_ready, compile_time, memory)
