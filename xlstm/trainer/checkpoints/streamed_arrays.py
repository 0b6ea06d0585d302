"""Arrays of a checkpoint, written and read chunk by chunk: they need not fit into memory.

The files are like those of `Checkpointer`: Orbax defines their layout, but not which chunk of an
array is in memory when.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from xlstm.trainer.checkpoints.arrays import read_array_metadata
from xlstm.trainer.checkpoints.storage import literal_path_handler


@dataclasses.dataclass(frozen=True)
class StreamedArray:
    """A float32 array as an iterator over equal chunks along its first axis.

    Attributes:
        shape: The shape of the array.
        num_chunks: The number of chunks; it divides `shape[0]`.
        chunks: The chunks in order, each of shape `(shape[0] / num_chunks, *shape[1:])`.
    """

    shape: tuple[int, ...]
    num_chunks: int
    chunks: Iterator[np.ndarray]


class _StreamedArrayHandler(type_handlers.TypeHandler):
    """An Orbax handler that writes arrays chunk by chunk, and opens them without reading."""

    def typestr(self) -> str:
        """Returns the type under which Orbax restores whole arrays."""
        return "jax.Array"

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        """Writes the chunks of all arrays one after the other."""
        for value, info in zip(values, infos, strict=True):
            rows = value.shape[0] // value.num_chunks
            spec = type_handlers.get_json_tspec_write(
                info,
                use_ocdbt=info.is_ocdbt_checkpoint,
                global_shape=value.shape,
                local_shape=(rows, *value.shape[1:]),
                dtype=np.dtype(np.float32),
                process_index=jax.process_index(),
            )
            await info.await_path_creation()
            array = await tensorstore.open(spec, create=True, context=info.ts_context)
            for index, chunk in enumerate(value.chunks):
                await array[index * rows : (index + 1) * rows].write(chunk)
        return []

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> list[tensorstore.TensorStore]:
        """Opens all arrays."""
        specs = [
            type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)
            for info in infos
        ]
        return [
            await tensorstore.open(spec, context=info.ts_context)
            for spec, info in zip(specs, infos, strict=True)
        ]

    async def metadata(self, infos: Sequence[ocp.type_handlers.ParamInfo]) -> Any:
        """Not needed here."""
        raise NotImplementedError


def _checkpointer() -> ocp.Checkpointer:
    registry = type_handlers.create_type_handler_registry((StreamedArray, _StreamedArrayHandler()))
    return ocp.Checkpointer(
        literal_path_handler(use_compression=False, type_handler_registry=registry)
    )


def write_streamed_arrays(path: str, arrays: Mapping[str, StreamedArray]) -> None:
    """Writes arrays, with one chunk in memory at a time, and checks that they can be read.

    Args:
        path: The folder to create for them.
        arrays: The arrays by name.

    Raises:
        Exception: Anything that the iterator over chunks or storage raises.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))
    float32 = np.dtype(np.float32)
    read_array_metadata(
        path, {k: jax.ShapeDtypeStruct(x.shape, float32) for k, x in arrays.items()}
    )


def open_streamed_arrays(path: str, names: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
    """Opens arrays; `array[index].read().result()` then reads only the chunks that it needs.

    Args:
        path: The folder of the arrays.
        names: The names of the arrays to open.

    Returns:
        The arrays by name.
    """
    wanted = dict.fromkeys(names, StreamedArray((), 0, iter(())))
    args = {name: ocp.RestoreArgs(restore_type=StreamedArray) for name in wanted}
    with _checkpointer() as checkpointer:
        restore = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
        return checkpointer.restore(path, args=restore)
