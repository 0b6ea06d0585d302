"""Which code wrote a checkpoint."""

import importlib.metadata
import os
import platform
import subprocess

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def code_version() -> dict[str, str]:
    """The git commit of this code, and the versions of Python and of the packages it rests on.

    Returns:
        Versions by name; `commit` ends in `+changes` if files differ from it, and is `unknown`
        outside of a git checkout.
    """
    packages = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"commit": _commit(), "python": platform.python_version(), **packages}


def _commit() -> str:
    # Bazel runs links to the files of the checkout.
    folder = os.path.dirname(os.path.realpath(__file__))
    command = [
        "git",
        "-C",
        folder,
        "describe",
        "--always",
        "--abbrev=40",
        "--exclude=*",
        "--dirty=+changes",
    ]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()
