"""Whether all processes see one and the same folder."""

import contextlib
import glob
import os
import secrets
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from xlstm.trainer.base.first_process import from_first_process

_PREFIX = ".seen_by_all_processes."
_SECONDS = 15  # Some network file systems show other machines' files late.


def check_shared_folder(path: str) -> None:
    """Checks that a folder of the first process is that of all processes.

    The first process makes a file there, whose name nobody can know or have asked for before. So
    the others see it only in this very folder, whatever they remember of a network file system.

    Args:
        path: The folder; the first process must have it for itself.

    Raises:
        OSError: In every process, if one of them does not see the file within some seconds.
    """
    if jax.process_count() == 1:
        return
    file = os.path.join(path, from_first_process(lambda: _make_file(path)))
    sees = np.ravel(multihost_utils.process_allgather(np.bool_(_appears(file))))
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):
            os.remove(file)
    if not sees.all():
        raise OSError(
            f"process {sees.argmin()} of {len(sees)} does not see what the first process makes in"
            f" {path}: the folder of the run must be one that all processes share"
        )


def _make_file(path: str) -> str:
    """Makes an empty file with a new name, and removes those that killed processes left."""
    for name in glob.glob(f"{_PREFIX}*", root_dir=path):
        os.remove(os.path.join(path, name))
    name = _PREFIX + secrets.token_hex(16)
    with open(os.path.join(path, name), "x"):
        return name


def _appears(file: str) -> bool:
    deadline = time.monotonic() + _SECONDS
    while not os.path.exists(file):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
