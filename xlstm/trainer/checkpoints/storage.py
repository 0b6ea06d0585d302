"""Which folders arrays can be stored in.

Orbax and TensorStore take some paths for something else than the name of a folder. What they read
into a path is circumvented where that is possible; the other paths are refused.
"""

import contextlib
import errno
import glob
import os
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding

_ROOM_BELOW = 256  # Bytes that the paths of the files in a folder of arrays may take further.
_CLOUDS = ("gs", "s3", "az", "hf")
_CLOUD_URLS = tuple(f"{name}:" for name in _CLOUDS)  # What is left of gs:// in an absolute path.


def check_storage_path(path: str) -> None:
    """Checks that arrays can be stored in a folder, which need not be there.

    Args:
        path: The folder, or one that it will be in.

    Raises:
        ValueError: If Orbax and TensorStore would fail in it, or store them elsewhere.
    """
    path = os.path.abspath(path)
    names = path.split(os.sep)[1:]
    if names[0] in _CLOUDS:
        reason = f"/{names[0]} stands for the files of a cloud"
    elif "\\" in path:
        reason = "a backslash stands for the end of a folder's name"
    elif any(name.endswith(".__lock") for name in names):
        reason = "names that end with .__lock are those of lock files"
    elif any(name.endswith("gs:") or name in _CLOUD_URLS for name in names):
        reason = "it looks like a URL of a cloud"
    elif any(0xDC80 <= ord(character) <= 0xDCFF for character in path):
        reason = "its name is not UTF-8"
    elif len(os.fsencode(path)) + _ROOM_BELOW > os.pathconf(os.sep, "PC_PATH_MAX"):
        reason = "its path is too long"
    else:
        return
    raise ValueError(f"checkpoints cannot be stored in {path!r} ({reason}): choose another folder")


def literal_path_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Makes what writes and reads arrays in folders whose path may hold `[`, `*` or `?`.

    Orbax looks for what the processes wrote by a pattern that begins with the path: there it finds
    nothing, or what belongs to another folder.

    Args:
        **options: Those of the handler.
    """
    handler = ocp.PyTreeCheckpointHandler(**options)
    finalize, restore = handler.finalize, handler.restore
    # Orbax takes arguments by the handler's very class: one derived from it will not do.
    handler.finalize = lambda directory: finalize(_literal(directory))
    handler.restore = lambda directory, **kwargs: restore(_literal(directory), **kwargs)
    return handler


def _literal(path: Any) -> Any:
    """A path of Orbax's that means itself in front of a pattern, too."""

    class LiteralPath(type(path)):
        def glob(self, pattern: str) -> Iterator[Any]:
            return (self / name for name in glob.glob(pattern, root_dir=self))

    return LiteralPath(path)


ITEM = "state"  # The folder of the arrays in that of a step.


@contextlib.contextmanager
def reported(what: str) -> Iterator[None]:
    """Turns whatever storage raises into one OSError that says what failed."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # The other processes are to blame, not storage.
        raise
    except Exception as error:  # Orbax and TensorStore raise ValueError, OSError and others.
        raise OSError(f"{what}: {storage_error(error)}") from error


def storage_error(error: Exception) -> str:
    """The operating system's words for a failure, if there are any in a long text."""
    text = " ".join(str(error).split()) or repr(error)
    text = text.partition(" [tensorstore_spec=")[0]
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:300]


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Writes arrays with as little work beside the training's as may be.

    Weights hardly get smaller by compression; and a record of the shardings, which takes a quarter
    of the time of a small checkpoint, would be of no use to a run on another mesh.
    """
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    return literal_path_handler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def restore_arguments(target: dict[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    """Asks Orbax for some of the arrays of a checkpoint, by name, placed as the target says."""
    return ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )


def save_arguments(arrays: dict[str, jax.Array]) -> ocp.args.PyTreeSave:
    """Asks Orbax to write arrays; of a stack of blocks each is a chunk, and can be read alone."""

    def is_stack(array: jax.Array) -> bool:
        # What may be cut over the pipeline's stages is a stack; on a mesh without stages, too.
        sharding = array.sharding
        return isinstance(sharding, NamedSharding) and sharding.spec[:1] == ("pp",)

    save_args = {
        name: ocp.SaveArgs(shard_axes=(0,) if is_stack(array) else ())
        for name, array in arrays.items()
    }
    return ocp.args.PyTreeSave(arrays, save_args)
