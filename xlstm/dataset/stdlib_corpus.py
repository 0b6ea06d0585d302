"""The corpus that every machine has: the source code of Python's standard library."""

import os
import sysconfig
from collections.abc import Iterator

from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import TokenStoreWriter, encode_documents
from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.files import FolderExistsError

# Installed packages, and tests, which are full of test data.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files() -> list[str]:
    """Returns the paths of the standard library's `.py` files, sorted, without tests."""
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def open_stdlib_store(path: str) -> TokenStore:
    """Opens the store of the standard library, and builds it first if it is missing.

    Several processes may do so at once: the first to finish wins, the others use its store.

    Args:
        path: The folder of the store.

    Returns:
        The store.

    Raises:
        ValueError: `path` exists and is not a complete store.
        OSError: The disk is full, or fails.
    """
    if not os.path.lexists(path):
        try:
            return build_stdlib_store(path)
        except FolderExistsError:
            pass
    return TokenStore.open(path)


def build_stdlib_store(path: str) -> TokenStore:
    """Writes the source of the standard library to a new store: bytes, one document per file.

    Args:
        path: The folder to create.

    Returns:
        The store, about 10 MB.

    Raises:
        FolderExistsError: `path` exists.
        ValueError: The interpreter has no source of its standard library.
        OSError: The disk is full, or fails.
    """
    tokenizer = ByteTokenizer()
    with TokenStoreWriter(path, tokenizer) as writer:
        for text in _texts():
            writer.add(encode_documents(tokenizer, [text]))
    return TokenStore.open(path)


def _texts() -> Iterator[str]:
    """Yields the text of each file; the rare file that is not UTF-8 is skipped."""
    for path in stdlib_files():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                yield file.read()
        except UnicodeDecodeError:
            continue
