"""Tests of pip: it installs the wheel, and builds the same wheel from the checkout.

They need the network, and a Python with pip and venv.
"""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from xlstm.testing.patience import PATIENCE

_WHEEL = next(Path("wheel/dist").glob("*.whl")).resolve()
# Bazel's files are links into the checkout.
_CHECKOUT = Path("pyproject.toml").resolve().parent


def _run(*words, **options):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        words, env=env, capture_output=True, text=True, timeout=PATIENCE, **options
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The programs of a new virtual environment."""
    folder = tmp_path_factory.mktemp("environment")
    _run(sys._base_executable, "-m", "venv", folder)
    return folder / "bin"


def test_pip_builds_the_same_wheel_from_the_checkout(environment, tmp_path):
    command = [environment / "pip", "wheel", "--quiet", "--no-deps", "-w", tmp_path, _CHECKOUT]
    _run(*command)
    (path,) = tmp_path.glob("*.whl")
    contents = [
        {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}
        for file in map(zipfile.ZipFile, (path, _WHEEL))
    ]
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


def test_pip_installs_the_wheel_and_its_command_trains(environment, tmp_path):
    lock = Path("third_party/requirements.txt").read_text()
    constraints = tmp_path / "constraints.txt"
    pins = re.findall(r"^([a-z0-9-]+)(?:\[.*?\])?(.*) \\$", lock, re.MULTILINE)
    constraints.write_text("".join(f"{name}{pin}\n" for name, pin in pins))
    _run(environment / "pip", "install", "--quiet", "-c", constraints, _WHEEL)
    _run(environment / "pip", "check")
    command = [environment / "xlstm-lm", "train", "--config=smoke"]
    output = _run(*command, cwd=tmp_path)
    assert "20 steps done; everything is in" in output
    assert (tmp_path / "runs" / "smoke" / "metrics.jsonl").exists()
