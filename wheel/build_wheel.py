"""Builds a wheel of given files, for the rule `wheel`.

Usage: build_wheel.py FILE, where the lines of FILE are FOLDER STATUS SOURCE...

FOLDER is for the wheel. STATUS is Bazel's file with the commit (`.bazelrc` says what writes it).
Each SOURCE is a path from the root of the workspace; one of them is `pyproject.toml`.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hatchling.build import build_wheel


@contextlib.contextmanager
def staged(sources: list[str], commit: str) -> Iterator[Path]:
    """Copies sources, with the commit beside `installation.py`, to a temporary folder.

    Args:
        sources: Paths from the root of the workspace, which is the current folder.
        commit: The commit that the sources are of.

    Yields:
        The folder.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for source in sources:
            (root / source).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, root / source)
        (root / "xlstm" / "COMMIT").write_text(f"{commit}\n")
        yield root


def recorded_commit(status: str) -> str:
    """Returns the commit in the text of Bazel's status file, or `unknown`."""
    found = re.search(r"^STABLE_COMMIT (.+)$", status, re.MULTILINE)
    return found[1] if found else "unknown"


def main(parameters: str) -> None:
    """Builds the wheel that the parameters describe."""
    folder, status, *sources = Path(parameters).read_text().splitlines()
    folder = os.path.abspath(folder)
    with staged(sources, recorded_commit(Path(status).read_text())) as root:
        os.chdir(root)
        build_wheel(folder)


if __name__ == "__main__":
    main(sys.argv[1])
