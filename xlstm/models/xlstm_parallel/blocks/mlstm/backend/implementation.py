"""Which program computes the chunkwise mLSTM: Pallas kernels for Hopper GPUs, or XLA."""

import concurrent.futures
import contextlib
import contextvars
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.kernel_errors import note_heads

# Data-center cards of the Hopper generation (sm_90), by the names that their drivers report.
_HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
_LARGEST_HEAD = 512  # Features of a head that a kernel holds in fast memory.
MOSAIC_CHUNK_SIZE = 64  # Tokens in a chunk of the kernels: the rows of one tensor-core instruction.

# Tokens in a chunk for heads of at most so many features, DHQK or DHV, in rising order; the last
# row is for all others. `docs/mlstm.md` has the figures.
_CHUNK_SIZES = {
    # Measured with DHQK/DHV of 32/64, 64/128, 128/256 and 256/512.
    "cpu": ((64, 32), (128, 64), (math.inf, 128)),
    # Counted for an H100 with 64/128, 128/256 and 256/512. TPUs take the same.
    "gpu": ((128, 64), (256, 128), (math.inf, 256)),
}


_INTERPRETED = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Lets the kernels traced in the context run anywhere, in Pallas's interpreter (jax 0.12)."""
    token = _INTERPRETED.set(True)
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def are_kernels_interpreted() -> bool:
    """Returns whether `interpreted_kernels` is in effect."""
    return _INTERPRETED.get()


class Device(NamedTuple):
    """What a program is compiled for.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`.
        kind: Name of the device.
    """

    platform: str
    kind: str


class Implementation(NamedTuple):
    """The chosen implementation.

    Attributes:
        name: `mosaic` or `xla`.
        reason: Why it is not `mosaic`; "" if it is, or if `xla` was asked for.
    """

    name: str
    reason: str


def current_device() -> Device:
    """Returns the device of the mesh in context, as in `jax.shard_map`, or JAX's first device."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return Device(described.platform, described.device_kind)
    first = jax.devices()[0]
    return Device(first.platform, first.device_kind)


def default_chunk_size(device: Device, qk_dim: int, v_dim: int) -> int:
    """Returns the chunk size of `fwbw` that was measured or counted to be the fastest.

    Args:
        device: The device that computes; accelerators other than GPUs are taken for one.
        qk_dim: `DHQK`.
        v_dim: `DHV`.

    Returns:
        The number of tokens in a chunk.
    """
    rows = _CHUNK_SIZES["cpu" if device.platform == "cpu" else "gpu"]
    return next(size for largest, size in rows if max(qk_dim, v_dim) <= largest)


def choose_implementation(
    requested: str, device: Device, dtype: jnp.dtype, qk_dim: int, v_dim: int
) -> Implementation:
    """Chooses the implementation of `fwbw`.

    Args:
        requested: `auto`, `xla` or `mosaic`.
        device: The device that computes.
        dtype: Type of `q`, `k` and `v`.
        qk_dim: `DHQK`.
        v_dim: `DHV`.

    Returns:
        The implementation. `auto` takes `mosaic` where it can run.

    Raises:
        ValueError: If `mosaic` is requested and cannot run.
    """
    if requested == "xla":
        return Implementation("xla", "")
    problem = _mosaic_problem(device, dtype, qk_dim, v_dim)
    if not problem:
        note_heads(qk_dim, v_dim, jnp.dtype(dtype).name)
        return Implementation("mosaic", "")
    if requested == "mosaic":
        raise ValueError(
            f"backend.implementation=mosaic cannot be used: {problem}; use auto or xla"
        )
    return Implementation("xla", problem)


def _mosaic_problem(device: Device, dtype: jnp.dtype, qk_dim: int, v_dim: int) -> str:
    """Returns why the kernels cannot run, or ""."""
    is_hopper = device.platform == "gpu" and _HOPPER.search(device.kind)
    if not is_hopper and not are_kernels_interpreted():
        return f"it needs a Hopper GPU, such as the H100, and the device is {device.kind}"
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"it needs bfloat16 or float16 queries, keys and values, and they are {dtype}"
    if max(qk_dim, v_dim) > _LARGEST_HEAD:
        return f"it needs heads of at most {_LARGEST_HEAD} features, and DHQK={qk_dim}, DHV={v_dim}"
    # Without a GPU, the program is compiled ahead of time for another machine.
    return _compile_problem() if jax.default_backend() == "gpu" else ""


@functools.cache
def _compile_problem() -> str:
    """Returns why a kernel does not compile on this machine, or ""; compiles the smallest one."""
    try:
        # Not every jaxlib has Mosaic GPU.
        from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import compile_smallest_kernel

        # In a thread of its own, which has no mesh in context.
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(compile_smallest_kernel).result()
    except Exception as error:  # The driver's and the compiler's may be anything.
        text = (str(error).strip() or "no message").splitlines()[0]
        return f"its smallest kernel does not compile here ({type(error).__name__}: {text})"
    return ""
