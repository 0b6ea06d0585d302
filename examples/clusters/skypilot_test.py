"""Tests of the file for SkyPilot: with its own parser, and of processes in its environment."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from examples.clusters.small_run import (
    NUM_STEPS,
    install_command,
    install_packages,
    read_losses,
    read_recipe,
    train_flags,
    wait_for_all,
    write_data,
)
from xlstm.testing.patience import PATIENCE, wait_until

_FILE = Path(__file__).parent / "skypilot" / "train.yaml"


@pytest.fixture(scope="module")
def task():
    """The content of the file, with a port that is free on this machine."""
    return read_recipe(_FILE)


def test_the_nodes_stop_with_the_status_that_recovers_them_and_resume(task, tmp_path):
    workdir = tmp_path / "run"
    flags = [*train_flags(workdir, write_data(tmp_path)), "--simulate_devices=2"]
    path = install_command(tmp_path, flags)["PATH"]
    num_nodes = task["num_nodes"]

    def start():
        # SkyPilot sets these for each node.
        return [
            subprocess.Popen(
                ["bash", "-c", task["run"]],
                env={
                    "PATH": path,
                    "SKYPILOT_NODE_IPS": "\n".join(["127.0.0.1"] * num_nodes),
                    "SKYPILOT_NUM_NODES": str(num_nodes),
                    "SKYPILOT_NODE_RANK": str(rank),
                },
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(num_nodes)
        ]

    processes = start()
    wait_until(lambda: len(read_losses(workdir)) > 5, processes[0], interval=0.1)
    processes[0].send_signal(signal.SIGTERM)
    statuses, output = wait_for_all(processes)
    step = int(re.search(r"stopped after step ([\d,]+), which is saved", output)[1])
    assert 0 < step < NUM_STEPS
    assert set(statuses) == set(task["resources"]["job_recovery"]["recover_on_exit_codes"])

    statuses, output = wait_for_all(start())
    assert set(statuses) == {0} and f"resuming from step {step}" in output


def test_skypilot_reads_the_file_and_rejects_mistakes(tmp_path):
    python = install_packages(tmp_path / "skypilot", "skypilot==0.14.1")
    (tmp_path / "dist").mkdir()
    text = _FILE.read_text()
    statuses = []
    for content in (text, text.replace("num_nodes", "num_node"), text.replace("[75]", "[often]")):
        (tmp_path / "train.yaml").write_text(content)
        done = subprocess.run(
            [python, "-c", "import sky; print(sky.Task.from_yaml('train.yaml').num_nodes)"],
            cwd=tmp_path,
            env=os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        statuses.append(done.returncode)
        print(done.stdout, done.stderr[-500:])
    assert statuses == [0, 1, 1]
