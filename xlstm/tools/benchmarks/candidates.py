"""The candidates of the benchmark: backends and external functions, with their FLOPs."""

import dataclasses
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    MOSAIC_CHUNK_SIZE,
    choose_implementation,
    current_device,
    default_chunk_size,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import (
    backend_config,
    create_backend,
)
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.tools.benchmarks.timed import TimedFunction, compile_passes

# Of an H100's data sheet: dense bfloat16 operations and bytes per second.
H100_RATES = {"operations": 989e12, "bytes": 3.35e12}


class Shape(NamedTuple):
    """Sizes of an mLSTM's inputs: `B`, `NH`, `T`, `DHQK`, `DHV`."""

    batch: int
    num_heads: int
    time: int
    qk_dim: int
    v_dim: int

    def __str__(self) -> str:
        """Returns the sizes as `--shapes` takes them."""
        return "x".join(map(str, self))


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An mLSTM that can be timed."""

    name: str  # The backend's name, module:function, or the name of another library.
    chunk_size: int | None  # Tokens in a chunk; 0 for one chunk, None for backends without chunks.
    options: dict[str, Any]  # The other options of the backend.
    function: Callable[..., Any]  # Maps q, k, v, i, f to h.
    implementation: str = ""  # The program of fwbw, or the kernel of another library.

    def timed_passes(self, inputs: Sequence[jax.Array]) -> Iterator[tuple[str, TimedFunction]]:
        """Prepares the passes; see `compile_passes`."""
        return compile_passes(self.function, inputs)

    def fits(self, shape: Shape) -> bool:
        """Returns whether the sequence is at least as long as a chunk."""
        return (self.chunk_size or 0) <= shape.time

    def forward_operations(self, shape: Shape) -> int:
        """Returns the useful floating-point operations of the forward pass.

        The chunkwise form with chunks of L tokens needs, per token and head, half of its L pairs at
        2 (DHQK + DHV) each, and 4 DHQK DHV to read and update the state. The parallel form needs
        only the pairs, with L = T. The recurrent form reads the state (2 DHQK DHV), decays it and
        adds an outer product (3 DHQK DHV). Functions and kernels of
        other libraries are counted as chunkwise.

        Args:
            shape: The sizes of the inputs.

        Returns:
            The operations for the whole input. Forward and backward need three times as many.
        """
        chunk_size = min(self.chunk_size or shape.time, shape.time)
        pairs = chunk_size * (shape.qk_dim + shape.v_dim)
        state = shape.qk_dim * shape.v_dim
        per_token = {"parallel_stabilized": pairs, "recurrent": 5 * state}
        tokens = shape.batch * shape.num_heads * shape.time
        return tokens * per_token.get(self.name, pairs + 4 * state)


def parse_shape(text: str) -> Shape:
    """Parses sizes such as `1x4x1024x64x128`; raises ValueError."""
    sizes = text.split("x")
    if len(sizes) != len(Shape._fields) or not all(_is_count(size) and int(size) for size in sizes):
        raise ValueError(
            f"--shapes={text}: expected five sizes BxNHxTxDHQKxDHV, such as 1x4x1024x64x128"
        )
    return Shape(*map(int, sizes))


def parse_chunk_size(text: str) -> int:
    """Parses a number of tokens, where 0 means one chunk; raises ValueError."""
    if not _is_count(text):
        raise ValueError(f"--chunk_sizes={text}: expected a whole number, 0 for one chunk")
    return int(text)


def backend_candidates(
    choice: BackendConfig,
    chunk_sizes: Sequence[int],
    implementations: Sequence[str],
    shape: Shape,
    dtype: jnp.dtype,
    model: ModelConfig | None = None,
) -> list[Candidate]:
    """Returns the candidates of one backend.

    Args:
        choice: The backend and its options.
        chunk_sizes: Tokens in a chunk, 0 for one chunk, -1 for the default of the device; a backend
            without chunks ignores them, and so does `mosaic`, which has chunks of 64.
        implementations: Implementations of `fwbw`; other backends ignore them.
        shape: The sizes of the inputs.
        dtype: Dtype of `q`, `k` and `v`.
        model: The model whose matmul precision is used; None for JAX's default.

    Returns:
        A candidate for each implementation, as `auto` chooses it, and chunk size, without
        repetitions; or one for a backend without chunks.

    Raises:
        ValueError: If an implementation is unknown or cannot run.
    """
    if choice.name != "fwbw":
        return [_backend_candidate(choice, None, "", model)]
    device, candidates = current_device(), {}
    for requested in implementations:
        requested = dataclasses.replace(choice, implementation=requested).implementation
        chosen = choose_implementation(
            requested, device, jnp.dtype(dtype), shape.qk_dim, shape.v_dim
        ).name
        sizes = [MOSAIC_CHUNK_SIZE] if chosen == "mosaic" else chunk_sizes
        for size in (_resolve_chunk_size(size, shape) for size in sizes):
            fwbw = dataclasses.replace(choice, chunk_size=size, implementation=chosen)
            candidates[chosen, size] = _backend_candidate(fwbw, size, chosen, model)
    return list(candidates.values())


def external_candidates(name: str, chunk_sizes: Sequence[int], shape: Shape) -> list[Candidate]:
    """Returns the candidates of an external function.

    Args:
        name: `module:function`; it is called as `function(q, k, v, i, f, chunk_size=...)` with
            `q, k (B, NH, T, DHQK)`, `v (B, NH, T, DHV)` and the gates' pre-activations
            `i, f (B, NH, T)`, chunk size None for one chunk, under `jit` and `grad`, and returns
            `h (B, NH, T, DHV)`.
        chunk_sizes: Tokens in a chunk, 0 for one chunk, -1 for the default of the device.
        shape: The sizes of the inputs.

    Returns:
        A candidate for each chunk size. Like all candidates it takes inputs with one axis `B * NH`.

    Raises:
        ValueError: If the module or function does not exist. A candidate raises it if the function
            fails or returns another shape.
    """
    external = _load_function(name)

    def candidate(chunk_size: int) -> Candidate:
        def function(*inputs):
            q, k, v, i, f = (x.reshape(shape.batch, shape.num_heads, *x.shape[1:]) for x in inputs)
            try:
                h = external(q, k, v, i, f, chunk_size=chunk_size or None)
            except Exception as error:  # A user's function may raise anything.
                raise ValueError(
                    f"--external={name} failed for q {q.shape}, v {v.shape} and"
                    f" chunk_size={chunk_size or None}: {type(error).__name__}: {error}"
                ) from error
            if getattr(h, "shape", None) != v.shape:
                given = getattr(h, "shape", type(h).__name__)
                raise ValueError(f"--external={name} returned {given}, expected h {v.shape}")
            return h.reshape(inputs[2].shape)

        return Candidate(name, chunk_size, {}, function)

    return [candidate(_resolve_chunk_size(size, shape)) for size in chunk_sizes]


def _resolve_chunk_size(chunk_size: int, shape: Shape) -> int:
    if chunk_size == -1:
        return default_chunk_size(current_device(), shape.qk_dim, shape.v_dim)
    return chunk_size


def _backend_candidate(
    choice: BackendConfig, chunk_size: int | None, implementation: str, model: ModelConfig | None
) -> Candidate:
    taken = {field.name for field in dataclasses.fields(backend_config(choice))}
    given = dataclasses.asdict(choice)
    options = {name: given[name] for name in given if name in taken - {"chunk_size"}}
    backend = create_backend(choice, model)
    return Candidate(choice.name, chunk_size, options, backend, implementation)


def _load_function(name: str) -> Callable:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--external={name}: expected module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # A user's module may raise anything.
        raise ValueError(
            f"--external={name}: the module cannot be imported: {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"--external={name}: {module_name} has no function {function_name}")
    return function


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit()
