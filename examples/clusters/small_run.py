"""A small run, and the command `xlstm-lm` that starts it, for the tests of the recipes."""

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE

NUM_STEPS = 100

_REPLACE = """
for word in "$@"; do
    shift
    case $word in --config* | --workdir*) ;; *) set -- "$@" "$word" ;; esac
done
set -- "$@" {flags}
"""


def install_command(folder: Path, flags: Sequence[str] = ()) -> dict[str, str]:
    """Writes `xlstm-lm` as the wheel installs it, to run this source code on the CPU.

    Args:
        folder: An existing folder.
        flags: If given, they replace the flags for the configuration and the folder of a run.

    Returns:
        The environment with which a shell finds the command, and `xlstm-python`, which runs Python
        with all that the command imports.
    """
    inherited = os.environ.get("XLA_FLAGS", "").split()
    xla_flags = " ".join(flag for flag in inherited if "device_count" not in flag)
    python_path = os.pathsep.join([os.getcwd(), *filter(None, sys.path)])
    commands = {
        "xlstm-python": f"export JAX_PLATFORMS=cpu XLA_FLAGS={shlex.quote(xla_flags)}\n"
        f"export PYTHONPATH={shlex.quote(python_path)}\n"
        f'exec {shlex.quote(sys.executable)} "$@"\n',
        "xlstm-lm": "tool=$1\nshift\n"
        + (_REPLACE.format(flags=shlex.join(flags)) if flags else "")
        + f'exec {folder}/xlstm-python -m "xlstm.tools.$tool" "$@"\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}")
        (folder / name).chmod(0o755)
    return os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def install_packages(folder: Path, *packages: str) -> Path:
    """Installs packages that hold schemas into an environment; returns its Python.

    The test is skipped if they cannot be had.

    Args:
        folder: A folder for the environment.
        *packages: What to install, with versions.
    """
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", *packages]
    for words in ([sys.executable, "-m", "venv", folder], pip):
        done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode:
            pytest.skip(f"{' '.join(packages)} cannot be installed: {done.stderr[-300:]}")
    return python


def write_data(folder: Path) -> Path:
    """Writes a token store; returns its path."""
    write_store(folder / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    return folder / "store"


def train_flags(workdir: Path, store: Path, num_steps: int = NUM_STEPS) -> list[str]:
    """Returns the flags of a run on four devices.

    Args:
        workdir: The run's folder.
        store: The token store.
        num_steps: The number of steps; the learning rates do not depend on it.
    """
    return [
        f"--workdir={workdir}",
        "--config=smoke",
        f"--config.data.stores={store}",
        "--config.data.context_length=16",
        "--config.logger.sample_tokens=4",
        f"--config.schedule.decay_steps={NUM_STEPS}",
        f"--config.trainer.num_steps={num_steps}",
        "--config.mesh.fsdp=2",
        "--config.mesh.tp=2",
    ]


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns the content of a YAML file, with a port that is free on this machine."""
    with socket.socket() as server:
        server.bind(("", 0))
        port = server.getsockname()[1]
    return yaml.safe_load(path.read_text().replace("12345", str(port)))


def wait_for_all(processes: Sequence[subprocess.Popen]) -> tuple[list[int], str]:
    """Waits for processes; returns their exit statuses and the output of the first."""
    try:
        outputs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs[0]


def read_losses(workdir: Path) -> list[tuple[int, str, float]]:
    """Returns step, name and value of all losses that a run has logged so far."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return [(row["step"], x, row[x]) for row in rows for x in ("loss", "val_loss") if x in row]
