"""File operations: paths that stay in their folder, bounded reads, atomic writes and checksums."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from xlstm.visible_text import short_repr

# The largest file that is read at once. The largest tokenizers have tens of megabytes.
MAX_BYTES = 200_000_000
_BLOCK_BYTES = 1 << 20  # Large enough that hashing lets other Python threads run.


# Paths that stay in their folder.


def inner_path(folder: str, name: str) -> str:
    """Returns the path of an entry of a folder.

    A link may lead to another entry below the folder. In the cache of the Hugging Face hub, it may
    also lead from `models--A--B/snapshots/...` to a file of `models--A--B/blobs`.

    Args:
        folder: The folder, which may itself be reached through a link.
        name: The plain name of the entry, which need not exist.

    Raises:
        ValueError: If `name` is not a plain name, or is a link that leads out of the folder.
    """
    try:
        is_plain = name not in ("", os.curdir, os.pardir) and not {os.sep, "\0"} & set(name)
        os.fsencode(name)
    except UnicodeEncodeError:
        is_plain = False
    if not is_plain:
        raise ValueError(f"{folder}: {name!r} is not a plain name of a file in that folder")
    path = os.path.join(folder, name)
    check_inside(folder, path)
    return path


def find_file(folder: str, name: str) -> str | None:
    """Returns the path of a file or folder in a folder, or None if it does not exist.

    Args:
        folder: The folder to look in.
        name: The plain name of the entry.

    Raises:
        ValueError: See `inner_path`; or the entry is neither a file nor a folder.
    """
    path = inner_path(folder, name)
    if not os.path.lexists(path):
        return None
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} is a broken link") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{path} is not a regular file")  # Opening a pipe might block forever.
    return path


def check_inside(folder: str, path: str) -> None:
    """Checks that a path does not lead out of its folder; see `inner_path`.

    Args:
        folder: The folder.
        path: A path below it, which may be a link.

    Raises:
        ValueError: If it leads out of the folder.
    """
    top, target = os.path.realpath(folder), os.path.realpath(path)
    if os.path.commonpath([top, target]) == top:
        return
    parent, is_snapshot, _ = top.rpartition(f"{os.sep}snapshots{os.sep}")
    is_cache = is_snapshot and os.path.basename(parent).startswith(("models--", "datasets--"))
    if not (is_cache and os.path.dirname(target) == os.path.join(parent, "blobs")):
        raise ValueError(
            f"{path} is a link that leads out of {folder}, to {target}: replace it with a copy of"
            " its target"
        )


def find_outward_link(folder: str) -> str | None:
    """Returns a sentence about the first link below a folder that leads out of it, or None."""
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)
            if os.path.islink(path):
                try:
                    check_inside(folder, path)
                except ValueError as error:
                    return str(error)
    return None


# Bounded reads.


def read_file(path: str) -> bytes:
    """Returns the content of a file from an untrusted source.

    Args:
        path: The file.

    Raises:
        ValueError: If it is not a regular file, or has more than `MAX_BYTES`.
        OSError: If it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is not a regular file")  # Opening a pipe might block forever.
    if status.st_size > MAX_BYTES:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes: expected a file of at most {MAX_BYTES:,}"
        )
    with open(path, "rb") as file:
        return file.read()


def read_json(path: str) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: The file.

    Raises:
        ValueError: If the file is missing or cannot be read, or `parse_json` rejects it.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(content, path)


def parse_json(content: str | bytes, name: str, *, strict: bool = False) -> dict[str, Any]:
    """Parses a JSON object and rejects duplicate fields, at any depth.

    Args:
        content: The text, or its UTF-8 bytes.
        name: The name of the content in errors.
        strict: Whether to reject NaN and Infinity, which Python writes and JSON does not define.

    Returns:
        The object.

    Raises:
        ValueError: If the content is not a JSON object, or is nested too deeply.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_reject_constant if strict else float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: it is not UTF-8 ({error})") from None
    except RecursionError:
        raise ValueError(f"{name} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # Invalid JSON, or an integer with too many digits for Python.
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def _reject_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which is not JSON")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the object of some fields; raises ValueError if a name occurs twice."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {short_repr(twice)} occurs twice")
    return fields


# Atomic writes.


class FolderExistsError(ValueError):
    """An error for a new folder whose path is taken."""


@contextlib.contextmanager
def naming_file(path: str) -> Iterator[None]:
    """Adds a path to each OSError of a block that has none, such as those of writes.

    Args:
        path: The file that the block reads or writes.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, path) from error


def write_atomically(path: str, content: str | bytes) -> None:
    """Writes a file so that its path always has either the old or the new content.

    Args:
        path: The file.
        content: The new content; text is written as UTF-8.
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
def new_folder(path: str, *, one_writer: bool = True) -> Iterator[str]:
    """Makes a folder that appears at its path once everything in it is written.

    After an error, nothing is left. A process that is killed leaves the temporary folder.

    Args:
        path: The folder to create; missing parents are created too.
        one_writer: Whether a second writer of the same path fails at once, because both write to
            `<path>.unfinished`. Otherwise each writes to its own `<path>.incomplete-...`, and the
            first to finish wins.

    Yields:
        The temporary folder to write into, next to `path`.

    Raises:
        FolderExistsError: If the path is taken, at the start or at the end.
        ValueError: If `<path>.unfinished` exists.
    """
    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise FolderExistsError(f"{path} exists already: choose another folder, or remove it")
    temporary = f"{path}.unfinished" if one_writer else f"{path}.incomplete-{secrets.token_hex(4)}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        os.mkdir(temporary)
    except FileExistsError:
        raise ValueError(
            f"{temporary} exists: wait for the process that writes it, or remove it if that process"
            " was interrupted"
        ) from None
    try:
        yield temporary
        _sync_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if not os.path.lexists(path):
                raise
            raise FolderExistsError(f"{path} was created by another process") from error
        _sync_folder(os.path.dirname(path))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_folder(path: str) -> None:
    """Flushes the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Checksums.


class Checksum:
    """A running checksum: the size and SHA-256 of bytes that arrive in pieces."""

    def __init__(self):
        """Starts at no bytes."""
        self._num_bytes, self._hash = 0, hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Adds the next bytes; any contiguous buffer is accepted."""
        self._hash.update(data)
        self._num_bytes += memoryview(data).nbytes

    @property
    def sha256(self) -> str:
        """The SHA-256 so far, in hexadecimal."""
        return self._hash.hexdigest()

    @property
    def entry(self) -> dict[str, int | str]:
        """The size in `bytes` and the `sha256`, as token stores and checkpoints record them."""
        return {"bytes": self._num_bytes, "sha256": self.sha256}


def file_checksum(path: str, *, sync: bool = False) -> Checksum:
    """Computes the checksum of a file, block by block.

    Args:
        path: The file.
        sync: Whether to flush the file to the disk afterwards.

    Returns:
        The checksum of all its bytes.

    Raises:
        OSError: If it cannot be read.
    """
    checksum = Checksum()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum.update(block)
        if sync:
            os.fsync(file.fileno())
    return checksum
