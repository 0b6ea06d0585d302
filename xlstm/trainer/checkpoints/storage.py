"""Storage of arrays by Orbax and TensorStore: paths, errors, handlers and arguments.

Orbax and TensorStore give some characters in a path a special meaning. This module works around
that where possible and rejects the other paths.
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

STATE_DIR = "state"  # Name of the folder with the arrays inside a step's folder.

_MAX_SUFFIX_BYTES = 256  # Longest path of a file below a folder of arrays.
_CLOUDS = ("gs", "s3", "az", "hf")
_CLOUD_URLS = tuple(f"{name}:" for name in _CLOUDS)  # gs:// in an absolute path.


def check_storage_path(path: str) -> None:
    """Checks that arrays can be stored in a folder, which need not exist.

    Args:
        path: The folder, or one of its parents.

    Raises:
        ValueError: If Orbax or TensorStore would fail there, or store the arrays elsewhere.
    """
    path = os.path.abspath(path)
    names = path.split(os.sep)[1:]
    if names[0] in _CLOUDS:
        reason = f"/{names[0]} means cloud storage"
    elif "\\" in path:
        reason = "a backslash ends the name of a folder"
    elif any(name.endswith(".__lock") for name in names):
        reason = "names that end with .__lock are reserved for lock files"
    elif any(name.endswith("gs:") or name in _CLOUD_URLS for name in names):
        reason = "it looks like a URL of cloud storage"
    elif any(0xDC80 <= ord(character) <= 0xDCFF for character in path):
        reason = "it is not UTF-8"
    elif len(os.fsencode(path)) + _MAX_SUFFIX_BYTES > os.pathconf(os.sep, "PC_PATH_MAX"):
        reason = "it is too long"
    else:
        return
    raise ValueError(f"checkpoints cannot be stored in {path!r} ({reason}): choose another folder")


@contextlib.contextmanager
def as_os_error(what: str) -> Iterator[None]:
    """Converts any exception of storage into an OSError that starts with what failed."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # From other processes, not from storage.
        raise
    except Exception as error:  # Orbax and TensorStore raise ValueError, OSError and others.
        raise OSError(f"{what}: {storage_error(error)}") from error


def storage_error(error: Exception) -> str:
    """Returns the operating system's message in an error, or else the start of the error."""
    text = " ".join(str(error).split()) or repr(error)
    text = text.partition(" [tensorstore_spec=")[0]
    for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES):
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:300]


def literal_path_handler(**options: Any) -> ocp.PyTreeCheckpointHandler:
    """Creates an Orbax handler for folders whose path may contain `[`, `*` or `?`.

    Orbax itself finds the files that the processes wrote with a pattern that starts with the path,
    which then matches nothing or another folder.

    Args:
        **options: Options of `PyTreeCheckpointHandler`.
    """
    handler = ocp.PyTreeCheckpointHandler(**options)
    finalize, restore = handler.finalize, handler.restore
    # Orbax looks arguments up by the exact class of a handler, so a subclass would not work.
    handler.finalize = lambda directory: finalize(_literal(directory))
    handler.restore = lambda directory, **kwargs: restore(_literal(directory), **kwargs)
    return handler


def _literal(path: Any) -> Any:
    """Returns an Orbax path that stays literal when a pattern follows it."""

    class LiteralPath(type(path)):
        def glob(self, pattern: str) -> Iterator[Any]:
            return (self / name for name in glob.glob(pattern, root_dir=self))

    return LiteralPath(path)


def array_handler() -> ocp.PyTreeCheckpointHandler:
    """Creates the Orbax handler for train states, which disturbs training as little as possible.

    It does not compress, since weights hardly get smaller. It does not record shardings, which
    takes a quarter of the time of a small checkpoint and is useless on another mesh.
    """
    arrays = ocp.type_handlers.ArrayHandler(enable_write_sharding_file=False)
    return literal_path_handler(
        use_compression=False,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((jax.Array, arrays)),
    )


def restore_arguments(target: dict[str, jax.ShapeDtypeStruct]) -> ocp.args.PyTreeRestore:
    """Returns arguments that restore the target's arrays, by name, with its shardings."""
    return ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )


def save_arguments(arrays: dict[str, jax.Array]) -> ocp.args.PyTreeSave:
    """Returns arguments that save arrays; each block of a stack is a chunk that is read alone."""

    def is_stack(array: jax.Array) -> bool:
        # Stacks are sharded over `pp`, even if the mesh has only one stage.
        sharding = array.sharding
        return isinstance(sharding, NamedSharding) and sharding.spec[:1] == ("pp",)

    save_args = {
        name: ocp.SaveArgs(shard_axes=(0,) if is_stack(array) else ())
        for name, array in arrays.items()
    }
    return ocp.args.PyTreeSave(arrays, save_args)
