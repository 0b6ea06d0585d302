"""Which folders arrays can be stored in.

Orbax and TensorStore take some paths for something else than the name of a folder. What they read
into a path is circumvented where that is possible; the other paths are refused.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp

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
