"""mLSTM kernels of other libraries, which the benchmark times next to ours if they are installed.

`mlstm_kernels` is a package for PyTorch, with kernels in Triton for CUDA GPUs. It is no dependency
of this project: install torch, triton and mlstm_kernels next to the locked packages to time it.
"""

import dataclasses
import importlib
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import jax
import numpy as np

from xlstm.tools.benchmarks.candidates import Candidate, Shape
from xlstm.tools.benchmarks.timed import PASSES, TimedFunction

PEERS = ("mlstm_kernels",)
PEER_CHUNK_SIZES = (64, 128, 256)

_KERNEL = "triton_xl_chunk"  # The fastest chunkwise kernel of the package.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchCandidate(Candidate):
    """An mLSTM in PyTorch.

    Attributes:
        shape: The sizes of its inputs.
        torch: The module `torch`.
        torch_device: The name of the device that computes.
    """

    shape: Shape
    torch: ModuleType
    torch_device: str

    def timed_passes(self, inputs: Sequence[jax.Array]) -> Iterator[tuple[str, TimedFunction]]:
        """Prepares the passes, on tensors with the values of `inputs`; see `Candidate`.

        The gates have the type of the queries too, as in the documentation of `mlstm_kernels`.
        """
        torch, shape = self.torch, self.shape

        def to_tensor(x: jax.Array) -> Any:
            values = np.asarray(x, np.float32).reshape(shape.batch, shape.num_heads, *x.shape[1:])
            return torch.tensor(values, dtype=dtype, device=self.torch_device)

        dtype = getattr(torch, inputs[0].dtype.name)
        *arguments, dh = (to_tensor(x) for x in inputs)
        for argument in arguments:
            argument.requires_grad_()
        options = {"chunk_size": self.chunk_size, **self.options}
        options["autocast_kernel_dtype"] = dtype

        def forward() -> Any:
            with torch.no_grad():
                return self.function(*arguments, **options)

        def backward() -> Any:
            h = self.function(*arguments, **options)
            return torch.autograd.grad(h, arguments, dh)

        for name, call in zip(PASSES, (forward, backward), strict=True):
            try:
                timed = self._prepare(call)
            except Exception as error:  # Another library may raise anything.
                raise ValueError(
                    f"--peers={self.name} failed for --shapes={shape} and chunk_size="
                    f"{self.chunk_size}: {type(error).__name__}: {error}"
                ) from error
            yield name, timed

    def _prepare(self, call: Callable[[], Any]) -> TimedFunction:
        """Runs a pass twice: once to compile its kernels, and once to measure its memory."""
        begin = time.perf_counter()
        call()
        self._wait()
        compile_time, memory = time.perf_counter() - begin, 0
        if self.torch_device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
            results = call()
            self._wait()
            kept = self.torch.cuda.memory_allocated()  # Arguments and results.
            memory = self.torch.cuda.max_memory_allocated() - kept
            del results
        return TimedFunction(call, self._wait, compile_time, memory)

    def _wait(self, results: Any = None) -> None:
        del results
        if self.torch_device == "cuda":
            self.torch.cuda.synchronize()


def peer_candidates(name: str, chunk_sizes: Sequence[int], shape: Shape) -> list[Candidate]:
    """Returns the candidates of another library.

    Call it before JAX starts the devices: it makes JAX share the memory of the GPU.

    Args:
        name: One of `PEERS`.
        chunk_sizes: Tokens in a chunk.
        shape: The sizes of the inputs.

    Returns:
        A candidate for each chunk size. It keeps the states for the backward pass, which is faster
        than the library's default.

    Raises:
        ValueError: If the name is unknown, or if a package or the GPU is missing.
    """
    if name not in PEERS:
        raise ValueError(f"--peers={name} is unknown; expected {', '.join(PEERS)}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torch = _import(name, "torch")
    if not torch.cuda.is_available():
        raise ValueError(
            f"--peers={name} needs a CUDA GPU, and torch {torch.__version__} finds none"
        )
    _import(name, "triton")
    function = _import(name, f"{name}.torch").get_mlstm_kernel(f"chunkwise--{_KERNEL}")
    options = {"recompute_states_in_bw": False}
    implementation = f"{_KERNEL} {importlib.metadata.version(name)}"
    torch_options = {"shape": shape, "torch": torch, "torch_device": "cuda"}
    return [
        TorchCandidate(name, size, options, function, implementation, **torch_options)
        for size in chunk_sizes
    ]


def _import(peer: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"--peers={peer} needs the packages torch, triton and {peer}, which this project does"
            f" not install: {error}"
        ) from error
