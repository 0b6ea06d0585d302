"""Tests of runs that Open MPI's mpirun starts."""

import os
import shutil
import signal
import subprocess

import pytest

from examples.clusters.small_run import (
    NUM_STEPS,
    install_command,
    read_losses,
    train_flags,
    write_data,
)
from xlstm.testing.patience import PATIENCE, wait_until

pytestmark = pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")

# As docs/clusters.md prints it, and what a container may need: a user named root, few cores.
_MPIRUN = ["mpirun", "-n", "2", "--mca", "odls_base_sigkill_timeout", "30"]
_CONTAINER = ["--allow-run-as-root", "--oversubscribe"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts a run in two processes of two devices each, and the runs' folder."""
    folder = tmp_path_factory.mktemp("runs")
    environment = install_command(folder)
    store = write_data(folder)

    def start(name, *flags, num_steps=NUM_STEPS, launcher=(*_MPIRUN, *_CONTAINER), devices=2):
        words = ["xlstm-lm", "train", f"--simulate_devices={devices}", "--stopped_status=75"]
        words += [*train_flags(folder / name, store, num_steps), *flags]
        return subprocess.Popen(
            [*launcher, *words, *(["--distributed"] if launcher else [])],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start, folder


def _end(process):
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output


def test_mpirun_trains_as_one_process_does(start):
    start, folder = start
    assert _end(start("alone", launcher=(), devices=4))[0] == 0
    status, output = _end(start("together"))
    assert status == 0, output
    assert "(4 CPU devices)" in output
    assert "\x1b" not in output  # No progress bar, which is for terminals.
    alone, together = read_losses(folder / "alone"), read_losses(folder / "together")
    assert [x[:2] for x in together] == [x[:2] for x in alone]
    assert [x[2] for x in together] == pytest.approx([x[2] for x in alone], rel=1e-5)


def test_mpirun_passes_sigterm_on_and_waits_for_the_checkpoint(start):
    start, folder = start
    # The only checkpoint is that of the signal.
    never = "--config.trainer.checkpoint_interval=100000"
    process = start("stopped", never, num_steps=100_000)
    wait_until(lambda: len(read_losses(folder / "stopped")) > 5, process, interval=0.1)
    process.send_signal(signal.SIGTERM)
    status, _ = _end(process)  # Mpirun passes no output on while it waits.
    assert status != 0
    last_step = read_losses(folder / "stopped")[-1][0]
    assert os.listdir(folder / "stopped" / "checkpoints") == [str(last_step)]
