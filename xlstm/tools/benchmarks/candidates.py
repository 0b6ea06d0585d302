"""The candidates of the benchmark: backends and external functions, with their FLOPs."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    current_device,
    default_chunk_size,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import (
    backend_config,
    create_backend,
)
from xlstm.models.xlstm_parallel.config import ModelConfig


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

    name: str  # The backend's name, or module:function.
    chunk_size: int | None  # Tokens in a chunk; 0 for one chunk, -1 for the device's default, None
    # for backends without chunks.
    options: dict[str, Any]  # The other options of the backend.
    function: Callable[..., jax.Array]  # Maps q, k, v, i, f to h.

    def fits(self, shape: Shape) -> bool:
        """Returns whether the sequence is at least as long as a chunk."""
        return (self.chunk_size or 0) <= shape.time

    def tokens_per_chunk(self, shape: Shape) -> int | None:
        """Returns the chunk size, in which -1 is replaced by the default for the shape."""
        return _tokens_per_chunk(self.chunk_size, shape.qk_dim, shape.v_dim)

    def forward_operations(self, shape: Shape) -> int:
        """Returns the useful floating-point operations of the forward pass.

        The chunkwise form with chunks of L tokens needs, per token and head, half of its L pairs at
        2 (DHQK + DHV) each, and 4 DHQK DHV to read and update the state. The parallel form needs
        only the pairs, with L = T. The recurrent form reads the state (2 DHQK DHV), decays it and
        adds an outer product (3 DHQK DHV). An external function is counted as chunkwise.

        Args:
            shape: The sizes of the inputs.

        Returns:
            The operations for the whole input. Forward and backward need three times as many.
        """
        chunk_size = min(self.tokens_per_chunk(shape) or shape.time, shape.time)
        pairs = chunk_size * (shape.qk_dim + shape.v_dim)
        state = shape.qk_dim * shape.v_dim
        per_token = {"parallel_stabilized": pairs, "recurrent": 5 * state}
        tokens = shape.batch * shape.num_heads * shape.time
        return tokens * per_token.get(self.name, pairs + 4 * state)


def _tokens_per_chunk(chunk_size: int | None, qk_dim: int, v_dim: int) -> int | None:
    return default_chunk_size(current_device(), qk_dim, v_dim) if chunk_size == -1 else chunk_size


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
    choice: BackendConfig, chunk_sizes: Sequence[int], model: ModelConfig | None = None
) -> list[Candidate]:
    """Returns the candidates of one backend.

    Args:
        choice: The backend and its options.
        chunk_sizes: Tokens in a chunk, 0 for one chunk; a backend without chunks ignores them.
        model: The model whose matmul precision is used; None for JAX's default.

    Returns:
        A candidate for each chunk size, or one for a backend without chunks.
    """
    if not hasattr(backend_config(choice), "chunk_size"):
        return [_backend_candidate(choice, None, model)]
    return [
        _backend_candidate(dataclasses.replace(choice, chunk_size=size), size, model)
        for size in chunk_sizes
    ]


def external_candidates(name: str, chunk_sizes: Sequence[int]) -> list[Candidate]:
    """Returns the candidates of an external function.

    Args:
        name: `module:function`; it is called as `function(q, k, v, i, f, chunk_size=...)` with
            `q, k (B, NH, T, DHQK)`, `v (B, NH, T, DHV)` and the gates' pre-activations
            `i, f (B, NH, T)`, chunk size None for one chunk, under `jit` and `grad`, and returns
            `h (B, NH, T, DHV)`.
        chunk_sizes: Tokens in a chunk, 0 for one chunk.

    Returns:
        A candidate for each chunk size.

    Raises:
        ValueError: If the module or function does not exist. A candidate raises it if the function
            fails or returns another shape.
    """
    external = _load_function(name)

    def candidate(chunk_size: int) -> Candidate:
        def function(q, k, v, i, f):
            tokens = _tokens_per_chunk(chunk_size, q.shape[-1], v.shape[-1]) or None
            try:
                h = external(q, k, v, i, f, chunk_size=tokens)
            except Exception as error:  # A user's function may raise anything.
                raise ValueError(
                    f"--external={name} failed for q {q.shape}, v {v.shape} and"
                    f" chunk_size={tokens}: {type(error).__name__}: {error}"
                ) from error
            if getattr(h, "shape", None) != v.shape:
                given = getattr(h, "shape", type(h).__name__)
                raise ValueError(f"--external={name} returned {given}, expected h {v.shape}")
            return h

        return Candidate(name, chunk_size, {}, function)

    return [candidate(size) for size in chunk_sizes]


def _backend_candidate(
    choice: BackendConfig, chunk_size: int | None, model: ModelConfig | None
) -> Candidate:
    taken = {field.name for field in dataclasses.fields(backend_config(choice))}
    given = dataclasses.asdict(choice)
    options = {name: given[name] for name in given if name in taken - {"chunk_size"}}
    return Candidate(choice.name, chunk_size, options, create_backend(choice, model))


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
