"""Tests of runs whose output cannot be written, or whose terminal closes."""

import json
import os
import signal
import time

import pytest

from xlstm.dataset.testing import write_store
from xlstm.testing.patience import PATIENCE, wait_until
from xlstm.tools import train
from xlstm.tools.testing.start_tool import start_tool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder for the runs and their data."""
    folder = tmp_path_factory.mktemp("output")
    write_store(folder / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    return folder


def _start(folder, workdir, *flags, **options):
    words = [
        f"--workdir={folder / workdir}",
        "--config=smoke",
        f"--config.data.stores={folder / 'store'}",
        "--config.data.context_length=16",
        "--config.trainer.eval_interval=5",
        "--config.logger.sample_tokens=4",
        *flags,
    ]
    env = {
        # The runs share compiled programs.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return start_tool(train, *words, env=env, **options)


def _rows(workdir):
    with open(workdir / "metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _wait_for_rows(process, workdir, number):
    exists = (workdir / "metrics.jsonl").exists
    wait_until(lambda: exists() and len(_rows(workdir)) >= number, process)


def test_a_run_outlives_the_reader_of_its_output(folder):
    process = _start(folder, "head")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=PATIENCE) == 0
    first, *others = errors.splitlines()
    assert first == "train: loading JAX and the model code ..."
    lost = "the standard output cannot be written (Broken pipe): continuing without it"
    assert [line for line in others if not line.startswith("train: ")] == [lost]
    training = [row for row in _rows(folder / "head") if "loss" in row]
    assert [row["step"] for row in training] == list(range(1, 21))
    assert training[-1]["terminal_lost"] == 1
    assert (folder / "head" / "checkpoints" / "20").is_dir()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux only")
def test_a_run_outlives_the_disk_of_its_log(folder):
    with open("/dev/full", "w") as full:
        process = _start(folder, "full", stdout=full, stderr=full)
        assert process.wait(timeout=PATIENCE) == 0
    assert _rows(folder / "full")[-2]["terminal_lost"] == 1


def _start_without_end(folder, workdir, **options):
    flags = ["--config.trainer.num_steps=100000", "--stopped_status=75"]
    process = _start(folder, workdir, *flags, **options)
    _wait_for_rows(process, folder / workdir, 5)
    return process


def test_when_the_terminal_closes_the_run_is_saved(folder):
    process = _start_without_end(folder, "closed")
    process.stdout.close()
    process.stderr.close()
    for _ in range(2):  # From the kernel and from the shell.
        process.send_signal(signal.SIGHUP)
        time.sleep(0.01)
    assert process.wait(timeout=PATIENCE) == 75
    last = _rows(folder / "closed")[-1]["step"]
    assert (folder / "closed" / "checkpoints" / str(last)).is_dir()


def test_a_run_under_nohup_goes_on(folder):
    process = _start_without_end(
        folder, "nohup", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    process.send_signal(signal.SIGHUP)
    _wait_for_rows(process, folder / "nohup", len(_rows(folder / "nohup")) + 20)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, errors
    assert "SIGTERM received: the run saves a checkpoint" in output and "SIGHUP" not in output
