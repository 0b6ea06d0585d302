"""Tests of processes that differ, or of which one fails at the start."""

import os
import shutil
import socket

import pytest

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE
from xlstm.tools import train
from xlstm.tools.testing.start_tool import start_tool

# One path, under which each process finds another store.
_STORE = "/proc/self/cwd/store"
pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/cwd"), reason="Linux only")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders for processes to start in, with stores that differ in one byte."""
    folder = tmp_path_factory.mktemp("processes")
    write_store(folder / "same" / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    shutil.copytree(folder / "same", folder / "changed")
    tokens = folder / "changed" / "store" / "tokens.bin"
    content = bytearray(tokens.read_bytes())
    content[100] ^= 1
    tokens.write_bytes(content)
    (folder / "empty").mkdir()
    return folder


def _errors(folder, *flags, start_in="same", **variables):
    """Starts two processes, the second with these options; returns their errors."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    words = [
        f"--workdir={folder / 'run'}",
        "--config=smoke",
        f"--config.data.stores={_STORE}",
        "--config.mesh.fsdp=2",
        "--simulate_devices=1",
        f"--coordinator_address=localhost:{port}",
        "--num_processes=2",
    ]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.getenv("PYTHONPATH")]))}
    processes = [
        start_tool(train, *words, "--process_id=0", env=env, cwd=folder / "same"),
        start_tool(
            train,
            *words,
            "--process_id=1",
            *flags,
            env=env | variables,
            cwd=folder / start_in,
        ),
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not (folder / "run").exists()
    lines = []
    for index, (process, (_, errors)) in enumerate(zip(processes, printed, strict=True)):
        assert process.returncode == 2, errors
        *others, line = errors.splitlines()
        assert all("[Gloo]" in x or x.startswith("train: ") for x in others), errors
        assert line.startswith(f"error: process {index} of 2: "), errors
        lines.append(line.removeprefix(f"error: process {index} of 2: "))
    return lines


@pytest.mark.parametrize(
    "how, named",
    [
        (
            {"flags": ["--config.schedule.peak_lr=0.5", "--config.trainer.seed=1"]},
            "process 1 has schedule.peak_lr=0.5, process 0 has schedule.peak_lr=0.001:"
            " start all processes with the same command",
        ),
        (
            {"flags": ["--simulate_devices=2"]},
            "process 1 has --simulate_devices=2, process 0 has --simulate_devices=1: start",
        ),
        (
            {"JAX_ENABLE_X64": "1"},
            "process 1 has jax_enable_x64=True, process 0 has jax_enable_x64=False: give",
        ),
        ({"start_in": "changed"}, f"process 1 has {_STORE}/tokens.bin='"),
    ],
    ids=["config", "flag", "environment", "store"],
)
def test_processes_that_differ_do_not_train(folder, how, named):
    how = dict(how)
    first, second = _errors(folder, *how.pop("flags", []), **how)
    assert first == second
    assert first.startswith(named)


def test_when_one_fails_at_the_start_the_other_says_why(folder):
    first, second = _errors(folder, start_in="empty")
    assert second.startswith(f"no token store at {_STORE}")
    assert first == f"process 1 has ended: {second}"
