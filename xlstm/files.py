"""Writing files and folders whole or not at all, and errors that name the file."""

import contextlib
import os
import shutil
from collections.abc import Iterator


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
