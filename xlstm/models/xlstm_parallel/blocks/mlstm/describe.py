"""Which program computes the mLSTM cells of a model."""

import jax

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    MOSAIC_CHUNK_SIZE,
    Device,
    Implementation,
    choose_implementation,
    default_chunk_size,
)
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig


def model_implementation(config: LanguageModelConfig, device: jax.Device) -> Implementation | None:
    """Chooses the implementation of the mLSTM cells of a model.

    Args:
        config: Configuration of the model.
        device: A device of the mesh.

    Returns:
        The implementation; None if the model has no mLSTM blocks, or another backend than `fwbw`.

    Raises:
        ValueError: If `config.backend.implementation` cannot run on the device.
    """
    model, backend = config.model, config.backend
    if backend.name != "fwbw" or model.block not in model.pattern.counts:
        return None
    return choose_implementation(
        backend.implementation, _describe(device), model.compute_dtype, *_head_dims(model)
    )


def mlstm_line(config: LanguageModelConfig, device: jax.Device) -> str:
    """Returns a line that says which program computes the mLSTM cells of a model, and why.

    Args:
        config: Configuration of the model.
        device: A device of the mesh.

    Returns:
        The line, such as `mLSTM: mosaic kernels, chunks of 64 tokens`; "" where
        `model_implementation` returns None.

    Raises:
        ValueError: If `config.backend.implementation` cannot run on the device.
    """
    chosen = model_implementation(config, device)
    if chosen is None:
        return ""
    if chosen.name == "mosaic":
        return f"mLSTM: mosaic kernels, chunks of {MOSAIC_CHUNK_SIZE} tokens"
    size = config.backend.chunk_size
    if size == -1:
        size = default_chunk_size(_describe(device), *_head_dims(config.model))
    chunks = f"chunks of {size:,} tokens" if size else "one chunk"
    reason = f" (not mosaic: {chosen.reason})" if chosen.reason else ""
    return f"mLSTM: XLA program, {chunks}{reason}"


def _describe(device: jax.Device) -> Device:
    return Device(device.platform, device.device_kind)


def _head_dims(model: ModelConfig) -> tuple[int, int]:
    """Returns `DHQK` and `DHV`."""
    return model.qk_dim // model.num_heads, model.v_dim // model.num_heads
