"""Files: read only within their folder and in bounds, written whole or not at all."""

import contextlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from xlstm.visible_text import short_repr

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


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ValueError: If there is no such file, it cannot be read, or `parse_json` refuses it.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(content, path)


def parse_json(content: str | bytes, name: str, *, strict: bool = False) -> dict[str, Any]:
    """Parses a JSON object, in which no object names a field twice.

    Args:
        content: The text, or its UTF-8.
        name: What to call it in an error.
        strict: Whether to refuse NaN and Infinity, which Python writes and JSON does not know.

    Returns:
        The object.

    Raises:
        ValueError: If it is none, or is nested or written in a way that cannot be read.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant if strict else float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: it is not UTF-8 ({error})") from None
    except RecursionError:
        raise ValueError(f"{name} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # Not JSON; or a number of thousands of digits.
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which JSON does not know")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of its fields; of two with one name, one would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {short_repr(twice)} is there twice")
    return fields


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Adds a file's name to the OSErrors of a block, which have it only if opening failed.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that, whatever happens, either the old content or the new one is there.

    Args:
        path: The file.
        content: Its content; text is written as UTF-8.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = f"{path}.tmp"
    try:
        with naming_file(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


@contextlib.contextmanager
def new_folder(path: str) -> Iterator[str]:
    """Makes a folder that gets its name when everything in it is written.

    Args:
        path: The folder to make.

    Yields:
        The folder to write into, beside it; after an error it is removed.

    Raises:
        ValueError: If there is something of that name, or the folder beside it is in use.
    """
    unfinished = f"{os.path.abspath(path)}.unfinished"
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: choose another folder")
    os.makedirs(os.path.dirname(unfinished), exist_ok=True)
    try:
        os.mkdir(unfinished)
    except FileExistsError:
        raise ValueError(
            f"{unfinished} is being written, or was left when writing it was interrupted: then"
            " remove it"
        ) from None
    try:
        yield unfinished
        os.rename(unfinished, path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
