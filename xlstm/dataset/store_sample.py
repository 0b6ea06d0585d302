"""Sampled digests of a token store, which tell stores apart without reading all of them."""

import os

from xlstm.dataset.token_store import TokenStore
from xlstm.files import Checksum

_BLOCK = 64 * 1024
_NUM_BLOCKS = 18  # In each file, including the first and the last block.


def sample_store(store: TokenStore) -> dict[str, str]:
    """Describes each file of a store: size, recorded checksum, and a digest of sampled blocks.

    The blocks are evenly spaced, at the same offsets in files of the same size. At most 1.2 MB of
    a file is read.

    Args:
        store: The store.

    Returns:
        A description of each file, by name.

    Raises:
        OSError: A file cannot be read.
    """
    return {
        name: f"{_sample_file(os.path.join(store.path, name))}, recorded SHA-256"
        f" {entry['sha256'][:16]}"
        for name, entry in store.meta.files.items()
    }


def _sample_file(path: str) -> str:
    checksum = Checksum()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        last = max(size - _BLOCK, 0)
        for offset in sorted({last * i // (_NUM_BLOCKS - 1) for i in range(_NUM_BLOCKS)}):
            file.seek(offset)
            checksum.update(file.read(_BLOCK))
    return f"{size} bytes with samples {checksum.sha256[:16]}"
