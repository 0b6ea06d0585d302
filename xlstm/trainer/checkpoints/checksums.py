"""Checksums of a folder's files: all are present, and every byte is as it was written."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from xlstm.files import (
    file_checksum,
    find_outward_link,
    parse_json,
    read_file,
    write_atomically,
)

# The file that holds the size and the SHA-256 of every other file in the folder.
CHECKSUMS = "checksums.json"
_THREADS = 4


def write_checksums(folder: str) -> None:
    """Flushes a folder's files to disk, then writes their checksums.

    Args:
        folder: The folder; nothing may change in it during the call.

    Raises:
        OSError: If a file cannot be read or written.
    """
    names = sorted(_files(folder))
    entries = _in_threads(
        lambda name: file_checksum(os.path.join(folder, name), sync=True).entry, names
    )
    write_atomically(
        os.path.join(folder, CHECKSUMS), _encode(dict(zip(names, entries, strict=True)))
    )


def has_checksums(folder: str) -> bool:
    """Returns whether `write_checksums` has finished in a folder."""
    return os.path.exists(os.path.join(folder, CHECKSUMS))


def find_damage(folder: str) -> str | None:
    """Compares every file of a folder with its checksum.

    Args:
        folder: The folder. Files without a checksum are ignored.

    Returns:
        What is wrong, as a main clause; None if nothing is.
    """
    try:
        content = read_file(os.path.join(folder, CHECKSUMS))
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{CHECKSUMS} cannot be read ({error.strerror})"
    try:
        entries = parse_json(content, CHECKSUMS)["files"]
        is_right = _encode(entries) == content
        is_right &= all(type(entry["bytes"]) is int for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        return f"{CHECKSUMS} has other bytes than were written"
    outward = find_outward_link(folder)
    if outward:
        return outward
    missing = entries.keys() - set(_files(folder))  # Files outside of the folder count as missing.
    if missing:
        return f"{min(missing)} is missing"
    # Sizes first: the check is cheap and finds most torn writes.
    for check in (_size_damage, _content_damage):
        found = _in_threads(lambda name, check=check: check(folder, name, entries[name]), entries)
        damage = next(filter(None, found), None)
        if damage:
            return damage
    return None


def _files(folder: str) -> list[str]:
    """Returns the paths of all files but the checksums, relative to the folder."""
    paths = [os.path.join(root, name) for root, _, names in os.walk(folder) for name in names]
    names = [os.path.relpath(path, folder) for path in paths if os.path.isfile(path)]
    return [name for name in names if name != CHECKSUMS]


def _in_threads(function: Callable, names: list[str] | dict) -> list:
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, names))


def _size_damage(folder: str, name: str, entry: dict) -> str | None:
    try:
        size = os.path.getsize(os.path.join(folder, name))
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    if size != entry["bytes"]:
        return f"{name} has {size:,} bytes, not the {entry['bytes']:,} that were written"
    return None


def _content_damage(folder: str, name: str, entry: dict) -> str | None:
    try:
        found = file_checksum(os.path.join(folder, name)).entry
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return None if found == entry else f"{name} has other bytes than were written"


def _encode(entries: dict) -> bytes:
    """Returns the content of the file: canonical, and with a checksum of its own."""
    files = json.dumps(entries, indent=1, sort_keys=True)
    digest = hashlib.sha256(files.encode()).hexdigest()
    return json.dumps({"files": entries, "sha256": digest}, indent=1, sort_keys=True).encode()
