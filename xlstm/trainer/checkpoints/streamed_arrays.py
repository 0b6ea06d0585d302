"""Arrays of a checkpoint, written and read a part at a time: all of them need not fit into memory.

The files are those that `Checkpointer` writes: Orbax lays them out, and has no say in when what of
an array is there.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint import type_handlers

from xlstm.trainer.checkpoints.arrays import stored_arrays
from xlstm.trainer.checkpoints.storage import literal_path_handler


@dataclasses.dataclass(frozen=True)
class ArrayParts:
    """An array that is made of equal parts, which follow each other along its first axis.

    Attributes:
        shape: The shape of the whole.
        num_parts: The number of parts; it divides the first axis.
        parts: The parts in their order, each of the shape `(shape[0] / num_parts, *shape[1:])`.
    """

    shape: tuple[int, ...]
    num_parts: int
    parts: Iterator[np.ndarray]


class _PartsHandler(type_handlers.TypeHandler):
    """Writes float32 arrays part by part, and opens them without reading."""

    def typestr(self) -> str:
        """As whom the arrays are saved: whoever wants them whole reads them as JAX's own."""
        return "jax.Array"

    async def serialize(
        self,
        values: Sequence[ArrayParts],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list:
        """Writes all arrays, one part after the other, each as a chunk of its own."""
        for value, info in zip(values, infos, strict=True):
            rows = value.shape[0] // value.num_parts
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
            for number, part in enumerate(value.parts):
                await array[number * rows : (number + 1) * rows].write(part)
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
        """Nobody asks it: see `TypeHandler`."""
        raise NotImplementedError


def _checkpointer() -> ocp.Checkpointer:
    registry = type_handlers.create_type_handler_registry((ArrayParts, _PartsHandler()))
    return ocp.Checkpointer(
        literal_path_handler(use_compression=False, type_handler_registry=registry)
    )


def write_parts(path: str, arrays: Mapping[str, ArrayParts]) -> None:
    """Writes arrays, one part in memory at a time, and makes sure that they can be read.

    Args:
        path: The folder to make for them.
        arrays: The arrays by name.

    Raises:
        Exception: Whatever a part raises, or storage.
    """
    with _checkpointer() as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))
    float32 = np.dtype(np.float32)
    stored_arrays(path, {k: jax.ShapeDtypeStruct(x.shape, float32) for k, x in arrays.items()})


def open_parts(path: str, names: Iterable[str]) -> dict[str, tensorstore.TensorStore]:
    """Opens arrays, so that `array[index].read().result()` reads no more than the chunks it needs.

    Args:
        path: The folder of the arrays.
        names: Which of them.

    Returns:
        The arrays by name.
    """
    wanted = dict.fromkeys(names, ArrayParts((), 0, iter(())))
    args = {name: ocp.RestoreArgs(restore_type=ArrayParts) for name in wanted}
    with _checkpointer() as checkpointer:
        restore = ocp.args.PyTreeRestore(wanted, restore_args=args, partial_restore=True)
        return checkpointer.restore(path, args=restore)
