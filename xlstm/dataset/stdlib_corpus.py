"""The corpus that every machine has: the source of the running interpreter's standard library."""

import os
import sysconfig
from collections.abc import Iterator

from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import TokenStoreWriter, encode_documents
from xlstm.dataset.tokenizer import ByteTokenizer
from xlstm.files import FolderExistsError

# What others installed, and tests: long, odd, and full of test data.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def stdlib_files() -> list[str]:
    """Returns the paths of the standard library's `.py` files, sorted, without tests."""
    files = []
    for folder, subfolders, names in os.walk(sysconfig.get_path("stdlib")):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def open_stdlib_store(path: str) -> TokenStore:
    """Opens the store of the standard library at `path`, and first builds it if there is none.

    Several processes may do so at once: the first to finish wins, the others use its store.

    Raises:
        ValueError: What lies at `path` is no whole store.
        OSError: The disk is full, or fails.
    """
    if not os.path.lexists(path):
        try:
            return build_stdlib_store(path)
        except FolderExistsError:
            pass
    return TokenStore.open(path)


def build_stdlib_store(path: str) -> TokenStore:
    """Writes the standard library's source into a new store, byte by byte, a file a document.

    Args:
        path: The folder to make.

    Returns:
        The store, some 10 MB.

    Raises:
        FolderExistsError: Something lies at `path`.
        ValueError: The interpreter comes without the source of its library.
        OSError: The disk is full, or fails.
    """
    tokenizer = ByteTokenizer()
    with TokenStoreWriter(path, tokenizer) as writer:
        for text in _texts():
            writer.add(encode_documents(tokenizer, [text]))
    return TokenStore.open(path)


def _texts() -> Iterator[str]:
    """Yields each file's text; the rare file that is not UTF-8 is left out."""
    for path in stdlib_files():
        try:
            with open(path, encoding="utf-8", newline="") as file:
                yield file.read()
        except UnicodeDecodeError:
            continue
