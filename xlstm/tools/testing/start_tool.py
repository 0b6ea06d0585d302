"""Tools in separate processes, for tests."""

import os
import subprocess
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any


def start_tool(
    tool: ModuleType, *words: str, env: Mapping[str, str] | None = None, **options: Any
) -> subprocess.Popen:
    """Starts a tool as a user does: it sees only the devices that its own flags simulate.

    Args:
        tool: The tool's module.
        *words: The tool's command line.
        env: Environment variables in addition to those of this process.
        **options: Further arguments of `subprocess.Popen`.

    Returns:
        The process. Its output and errors are text in two pipes, unless `options` change that.
    """
    inherited = os.environ | {"XLA_FLAGS": _without_devices(os.environ.get("XLA_FLAGS", ""))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-m", tool.__name__, *words],
        text=True,
        errors="replace",
        env=inherited | (env or {}),
        **(pipes | options),
    )


def _without_devices(xla_flags: str) -> str:
    """Returns XLA's flags without the devices that an `xlstm_test` simulates."""
    flags = xla_flags.split()
    devices = "--xla_force_host_platform_device_count="
    return " ".join(flag for flag in flags if not flag.startswith(devices))
