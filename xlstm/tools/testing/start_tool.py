"""Tools in processes of their own, for tests."""

import os
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def start_tool(
    tool: ModuleType, *words: str, env: Mapping[str, str], **options: Any
) -> subprocess.Popen:
    """Starts a tool as a user does.

    Args:
        tool: Its module.
        *words: Its command line.
        env: Environment variables beside those of this process.
        **options: Further arguments of `subprocess.Popen`.

    Returns:
        The process; its output and errors are text in pipes of their own, unless options say else.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", tool.__name__, *words],
        text=True,
        errors="replace",
        env=os.environ | env,
        **(pipes | options),
    )
