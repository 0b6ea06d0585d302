"""Tests of the same run on one device, on several, in processes, and with a process killed."""

import json
import os
import re
import signal
import socket
import time

import pytest

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE
from xlstm.tools import train
from xlstm.tools.testing import diverging_train
from xlstm.tools.testing.start_tool import start_tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the runs and their data."""
    folder = tmp_path_factory.mktemp("devices")
    write_store(folder / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    return folder


def _start(folder, workdir, *flags, tool=train):
    words = [
        f"--workdir={folder / workdir}",
        "--config=smoke",
        f"--config.data.stores={folder / 'store'}",
        "--config.data.context_length=16",
        "--config.logger.sample_tokens=4",
        "--config.schedule.decay_steps=20",
        *flags,
    ]
    return start_tool(tool, *words)


def _finish(*processes):
    """Waits for the processes of a run; returns what each printed."""
    try:
        printed = [process.communicate(timeout=PATIENCE) for process in processes]
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
    """The metrics of a run on one device."""
    _finish(_start(folder, "one"))
    losses = _losses(folder / "one")
    assert len(losses) == 20 * 2 + 3
    return losses


def _assert_same(found, expected):
    assert [key[:2] for key in found] == [key[:2] for key in expected]
    for one, other in zip(found, expected, strict=True):
        tolerance = 1e-4 if one[1] == "grad_norm" else 1e-5
        assert one[2] == pytest.approx(other[2], rel=tolerance), one[:2]


def test_simulated_devices_train_the_same(folder, one_device):
    sizes = ["--config.mesh.fsdp=2", "--config.mesh.tp=2", "--config.mesh.pp=2"]
    (output,) = _finish(_start(folder, "eight", "--simulate_devices=8", *sizes))
    _assert_same(_losses(folder / "eight"), one_device)
    assert "pipeline stages are idle for 33% of the time" in output
    with open(folder / "eight" / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert {round(row["bubble_fraction"], 3) for row in rows if "loss" in row} == {0.333}


def _start_together(folder, workdir, num_processes, *flags, devices_each=2, tool=train):
    """Starts the processes of a run."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    together = [
        f"--simulate_devices={devices_each}",
        f"--coordinator_address=localhost:{port}",
        f"--num_processes={num_processes}",
    ]
    return [
        _start(folder, workdir, *together, f"--process_id={index}", *flags, tool=tool)
        for index in range(num_processes)
    ]


def _wait_for_step(workdir, step):
    # Look often: soon comes a checkpoint, in which processes wait for each other longer.
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if os.path.exists(workdir / "metrics.jsonl") and any(
            row[0] >= step for row in _losses(workdir)
        ):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {workdir}")


def _kill_one(folder, workdir, victim):
    """Trains in two processes, kills one of them after step 13, and waits for the other."""
    # Weights are sharded over the processes. A second device of the other process could wait for
    # the first until a timeout.
    flags = ["--config.mesh.fsdp=2", "--config.trainer.num_steps=100000"]
    processes = _start_together(folder, workdir, 2, *flags, devices_each=1)
    try:
        _wait_for_step(folder / workdir, 13)
        processes[victim].send_signal(signal.SIGKILL)
        output, errors = processes[1 - victim].communicate(timeout=PATIENCE)
    finally:
        for process in processes:
            process.kill()
    assert processes[1 - victim].returncode != 0
    return output, errors


def test_processes_train_the_same_and_when_one_is_killed_others_go_on(folder, one_device):
    _, errors = _kill_one(folder, "some", victim=1)
    assert "error: process 0 of 2: the computation with the other processes failed" in errors
    assert "start all of them again" in errors
    before = [loss for loss in _losses(folder / "some") if loss[0] <= 20]
    assert before[-1][0] >= 13
    _assert_same(before, one_device[: len(before)])

    # Resume with twice as many processes, of two devices each, as stages and replicas.
    sizes = ["--config.mesh.pp=2", "--config.mesh.tp=2"]
    first, *others = _finish(*_start_together(folder, "some", 4, *sizes))
    assert re.search("resuming from step [12]0", first)
    assert not any("loss" in output for output in others)  # Only process 0 prints.
    after = [loss for loss in _losses(folder / "some") if loss[0] <= 20]
    _assert_same(after, one_device)


def test_a_process_that_is_asked_to_stop_stops_all(folder, one_device):
    flags = ["--config.mesh.fsdp=2", "--config.mesh.tp=2", "--config.trainer.num_steps=100000"]
    processes = _start_together(folder, "stopped", 2, *flags)
    try:
        _wait_for_step(folder / "stopped", 5)
        processes[1].send_signal(signal.SIGTERM)
        first, second = _finish(*processes)
    finally:
        for process in processes:
            process.kill()
    assert "stopped" not in second  # Only process 0 prints.
    step = int(re.search(r"stopped after step ([\d,]+), which is saved", first)[1].replace(",", ""))
    losses = _losses(folder / "stopped")
    assert losses[-1][0] == step and (folder / "stopped" / "checkpoints" / str(step)).is_dir()
    _assert_same(
        [loss for loss in losses if loss[0] <= 20], [x for x in one_device if x[0] <= step]
    )


def test_processes_roll_back_together(folder):
    flags = [
        "--config.trainer.nan_policy=rollback",
        "--config.trainer.checkpoint_interval=5",
        "--config.trainer.keep_best_checkpoint",
        "--config.trainer.max_checkpoints=1",
    ]
    _finish(_start(folder, "alone", *flags, tool=diverging_train))
    together = ["--config.mesh.fsdp=2", *flags]
    first, second = _finish(
        *_start_together(folder, "both", 2, *together, devices_each=1, tool=diverging_train)
    )
    assert "training diverged at step 13 " in first and "diverged" not in second
    for name in ("alone", "both"):
        with open(folder / name / "metrics.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        returns = {x["step"]: x["rolled_back_to"] for x in rows if "rolled_back_to" in x}
        assert returns == {13: 10, 17: 15}
        assert rows[-1]["step"] == 20
        assert os.listdir(folder / name / "checkpoints") == ["20"]  # The last is also the best.
    _assert_same(_losses(folder / "both"), _losses(folder / "alone"))


def test_when_the_first_process_is_killed_the_other_ends_and_one_goes_on(folder, one_device):
    output, errors = _kill_one(folder, "first", victim=0)
    assert "loss" not in output
    # Either the process reports it, or JAX first notices that the coordinator is gone.
    assert re.search(
        "error: process 1 of 2: the computation with the other processes failed"
        "|Terminating process because the JAX distributed service detected fatal errors",
        errors,
    )
    (output,) = _finish(_start(folder, "first"))
    assert re.search("resuming from step [12]0", output)
    _assert_same([loss for loss in _losses(folder / "first") if loss[0] <= 20], one_device)
