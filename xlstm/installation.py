"""How this code came here: its version, its commit, and what its commands are called.

It is either a checkout or an installed wheel. A wheel has a file with the commit that it was built
from, `COMMIT`, beside this module.
"""

import os
import subprocess

VERSION = "0.1.0"
_COMMIT_FILE = "COMMIT"


def commit() -> str:
    """Returns the git commit of this code.

    Returns:
        The commit; it ends in `+changes` if files differ from it, and is `unknown` if this is
        neither a git checkout nor a wheel that was built from one.
    """
    if (recorded := _recorded_commit()) is not None:
        return recorded
    # Under Bazel, this file is a link into the checkout.
    path = os.path.realpath(__file__)
    git = ["git", "-C", os.path.dirname(path)]
    describe = ["describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
    try:
        # A copy of this code may be inside of another project's checkout.
        _run([*git, "ls-files", "--error-unmatch", "--", path])
        return _run([*git, *describe]).strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def is_installed() -> bool:
    """Returns whether this is an installed wheel, and not a checkout."""
    return _recorded_commit() is not None


def tool_command(tool: str) -> str:
    """Returns how to call a tool, up to its arguments.

    Args:
        tool: The tool's name, such as `train`.
    """
    if is_installed():
        return f"xlstm-lm {tool}"
    return f"./bazelw run //xlstm/tools:{tool} --"


def _recorded_commit() -> str | None:
    """Returns what a wheel records; None in a checkout."""
    try:
        with open(os.path.join(os.path.dirname(__file__), _COMMIT_FILE), encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return None


def _run(words: list[str]) -> str:
    return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
