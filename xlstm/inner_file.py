"""Finds files of folders that others have made, and nothing outside of these folders."""

import os
import stat

# Of a file that is read at once. The largest tokenizers have tens of megabytes.
MAX_BYTES = 200_000_000


def inner_path(folder: str, name: str) -> str:
    """Returns the path of something in a folder.

    A link may lead to something else in the folder; and, as in the cache of the Hugging Face hub,
    from `models--A--B/snapshots/...` to a file of `models--A--B/blobs`.

    Args:
        folder: The folder; how one comes to it does not matter.
        name: A plain name in it; there need not be anything of that name.

    Raises:
        ValueError: If it is no plain name, or a link that leads out of the folder.
    """
    try:
        is_plain = name not in ("", os.curdir, os.pardir) and not {os.sep, "\0"} & set(name)
        os.fsencode(name)
    except UnicodeEncodeError:
        is_plain = False
    if not is_plain:
        raise ValueError(f"{folder}: {name!r} is no plain name of a file in that folder")
    path = os.path.join(folder, name)
    check_inside(folder, path)
    return path


def find_file(folder: str, name: str) -> str | None:
    """Finds a file, or a folder, in a folder.

    Args:
        folder: The folder.
        name: Its plain name.

    Returns:
        Its path; None if there is nothing of that name.

    Raises:
        ValueError: See `inner_path`; or if it is neither a file nor a folder.
    """
    path = inner_path(folder, name)
    if not os.path.lexists(path):
        return None
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is a link to nothing") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is no file")  # A pipe might be waited for without an end.
    return path


def check_inside(folder: str, path: str) -> None:
    """Checks that a path in a folder does not lead out of it; see `inner_path`.

    Args:
        folder: The folder.
        path: The path.

    Raises:
        ValueError: If it does.
    """
    top, target = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([top, target]) == top:
        return
    parent, is_snapshot, _ = top.rpartition(f"{os.sep}snapshots{os.sep}")
    is_cache = is_snapshot and os.path.basename(parent).startswith(("models--", "datasets--"))
    if not (is_cache and os.path.dirname(target) == os.path.join(parent, "blobs")):
        raise ValueError(
            f"{path} is a link that leads out of {folder}, to {target}: put what is there into the"
            " folder"
        )


def read_file(path: str) -> bytes:
    """Reads a file that somebody else may have made.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: If it is no file, or too large to be what anybody reads at once.
        OSError: If it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no file")  # A pipe might be waited for without an end.
    if status.st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes: expected a file of at most {MAX_BYTES:,}"
        )
    with open(path, "rb") as file:
        return file.read()


def find_outward_link(folder: str) -> str | None:
    """Looks at everything in a folder, and in the folders there.

    Args:
        folder: The folder.

    Returns:
        What is wrong with a link that leads out of it, as a sentence; None if there is none.
    """
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            if os.path.islink(path):
                try:
                    check_inside(folder, path)
                except ValueError as error:
                    return str(error)
    return None
