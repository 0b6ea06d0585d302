"""The same run on one device, on several, and in several processes."""

import json
import os
import socket
import subprocess
import sys

import pytest

from xlstm.dataset.testing import write_store
from xlstm.tools import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the runs and their data lie."""
    folder = tmp_path_factory.mktemp("devices")
    write_store(folder / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    return folder


def _start(folder, workdir, *flags):
    words = [
        f"--workdir={folder / workdir}",
        "--config=smoke",
        f"--config.data.stores={folder / 'store'}",
        "--config.data.context_length=16",
        "--config.logger.sample_tokens=4",
        *flags,
    ]
    # Compile quickly. No devices but those that the flags ask for.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    return subprocess.Popen(
        [sys.executable, "-m", train.__name__, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=env,
    )


def _finish(*processes):
    """Waits for the processes of a run; returns what each printed."""
    try:
        printed = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, printed, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in printed]


def _losses(workdir):
    with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    names = ("loss", "val_loss", "grad_norm")
    return [(row["step"], name, row[name]) for row in rows for name in names if name in row]


@pytest.fixture(scope="module")
def one_device(folder):
    """What a run on one device measured."""
    _finish(_start(folder, "one"))
    losses = _losses(folder / "one")
    assert len(losses) == 20 * 2 + 3
    return losses


def _assert_same(found, expected):
    assert [key[:2] for key in found] == [key[:2] for key in expected]
    for one, other in zip(found, expected, strict=True):
        assert one[2] == pytest.approx(other[2], rel=1e-4), one[:2]


def test_simulated_devices_train_the_same(folder, one_device):
    _finish(_start(folder, "four", "--simulate_devices=4"))
    _assert_same(_losses(folder / "four"), one_device)


def _free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_train_the_same_and_can_go_on_as_one(folder, one_device):
    port = _free_port()
    processes = [
        _start(
            folder,
            "two",
            f"--coordinator_address=localhost:{port}",
            "--num_processes=2",
            f"--process_id={index}",
            "--config.trainer.num_steps=10",
        )
        for index in range(2)
    ]
    first, second = _finish(*processes)
    assert "validation loss" in first
    assert "loss" not in second  # One process speaks for all.
    _assert_same(_losses(folder / "two"), [loss for loss in one_device if loss[0] <= 10])
    (output,) = _finish(_start(folder, "two"))
    assert "going on from step 10" in output
    _assert_same(_losses(folder / "two"), one_device)
