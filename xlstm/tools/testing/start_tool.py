"""Tools in separate processes, for tests."""

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
        tool: The tool's module.
        *words: The tool's command line.
        env: Environment variables in addition to those of this process.
        **options: Further arguments of `subprocess.Popen`.

    Returns:
        The process. Its output and errors are text in two pipes, unless `options` change that.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", tool.__name__, *words],
        text=True,
        errors="replace",
        env=os.environ | env,
        **(pipes | options),
    )
