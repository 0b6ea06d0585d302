"""Tests of the recipe for SLURM, on a cluster of two nodes on this machine."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from examples.clusters.slurm_cluster import missing_programs, slurm_cluster, up
from examples.clusters.small_run import (
    NUM_STEPS,
    install_command,
    read_losses,
    train_flags,
    write_data,
)
from xlstm.testing.patience import PATIENCE, wait_until

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"SLURM is not installed: {', '.join(missing_programs())}"
)

_RECIPE = Path(__file__).parent / "slurm" / "train.sbatch"
# Options with which a user fits the recipe to a cluster of two nodes without GPUs.
_SIZES = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0"]


class _Cluster:
    """A running cluster, and a folder for the runs on it."""

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.store = write_data(folder)

    def run(self, *words: str) -> str:
        """Runs a command of SLURM, and returns its output."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout.strip()

    def submit(self, name: str, *flags: str, options=(), **environment: str) -> str:
        """Submits the recipe; returns the number of the job, whose log is `log(name)`."""
        words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={self.folder}/{name}.log"]
        names = [f"--export=ALL,{','.join(f'{x}={y}' for x, y in environment.items())}"]
        return self.run(*words, *(names if environment else []), *_SIZES, *options, _RECIPE, *flags)

    def train(self, name: str, *, num_steps=NUM_STEPS, options=()) -> str:
        """Submits a small run."""
        flags = train_flags(self.folder / name, self.store, num_steps)
        return self.submit(name, *flags, "--simulate_devices=1", options=options)

    def preempt(self) -> None:
        """Runs a job that needs both nodes and goes before all others."""
        words = ["--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.log"]
        self.run("sbatch", *words, "--wrap=true")

    def job(self, number: str) -> dict[str, str]:
        """Returns what SLURM knows about a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for_state(self, number: str, *states: str) -> dict[str, str]:
        """Waits until a job is in one of these states; returns what SLURM knows about it."""
        wait_until(lambda: self.job(number)["JobState"] in states, interval=0.2)
        return self.job(number)

    def log(self, name: str) -> str:
        """Returns the log of a job, in which all characters are whole."""
        path = self.folder / f"{name}.log"
        return path.read_bytes().decode() if path.exists() else ""

    def wait_for_step(self, name: str, step: int) -> None:
        """Waits until a run has logged a step."""
        wait_until(lambda: any(x[0] >= step for x in read_losses(self.folder / name)), interval=0.1)


_ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of two nodes."""
    folder = tmp_path_factory.mktemp("runs")
    with _short_folder() as short, slurm_cluster(short) as variables:
        yield _Cluster(folder, install_command(folder) | variables)


@contextlib.contextmanager
def _short_folder():
    """Makes a folder whose path is short enough for sockets, which those of Bazel are not."""
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """The losses of a run that nothing disturbs, on two nodes of two tasks each."""
    job = cluster.train("undisturbed")
    state = cluster.wait_for_state(job, *_ENDED)
    assert state["JobState"] == "COMPLETED", cluster.log("undisturbed")
    assert state["Restarts"] == "0" and state["NumNodes"] == "2" and state["NumTasks"] == "4"
    return read_losses(cluster.folder / "undisturbed")


def test_the_recipe_trains_as_one_process_does(cluster, undisturbed):
    assert "(4 CPU devices)" in cluster.log("undisturbed")
    flags = train_flags(cluster.folder / "alone", cluster.store)
    cluster.run("xlstm-lm", "train", *flags, "--simulate_devices=4")
    alone = read_losses(cluster.folder / "alone")
    assert [x[:2] for x in undisturbed] == [x[:2] for x in alone]
    assert len(alone) > NUM_STEPS
    assert [x[2] for x in undisturbed] == pytest.approx([x[2] for x in alone], rel=1e-5)


def test_a_run_that_is_stopped_and_then_preempted_goes_on_bit_for_bit(cluster, undisturbed):
    job = cluster.train("disturbed")
    cluster.wait_for_step("disturbed", 5)
    cluster.run("scancel", "--signal=TERM", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", interval=0.2)
    first = read_losses(cluster.folder / "disturbed")[-1][0]
    assert 5 <= first < NUM_STEPS

    cluster.wait_for_step("disturbed", first + 5)
    cluster.preempt()
    second = read_losses(cluster.folder / "disturbed")[-1][0]
    assert first + 5 <= second < NUM_STEPS

    state = cluster.wait_for_state(job, *_ENDED)
    log = cluster.log("disturbed")
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), log
    for step in (first, second):
        assert f"stopped after step {step}, which is saved" in log
        assert f"resuming from step {step}" in log
    assert log.count(f"{NUM_STEPS} steps done") == 1
    assert read_losses(cluster.folder / "disturbed") == undisturbed


def test_a_killed_task_ends_the_job_and_the_log_says_why(cluster):
    job = cluster.train("killed", num_steps=100_000)
    cluster.wait_for_step("killed", 5)
    # Columns: process, job, step, index on the node, index in the step.
    tasks = [
        line.split()
        for line in cluster.run("scontrol", "listpids", f"{job}.0", "127.0.0.3").splitlines()
    ]
    (victim,) = {int(task[0]) for task in tasks if task[4] == "2"} & _processes_of("train")
    start = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    state = cluster.wait_for_state(job, *_ENDED)
    print(f"the job ended {time.monotonic() - start:.1f} s after the kill of a task")
    log = cluster.log("killed")
    assert state["JobState"] == "FAILED" and state["Restarts"] == "0"
    assert "task 2: Killed" in log
    failed = "the computation with the other processes failed .* start all of them again to resume"
    assert re.search(f"error: process [013] of 4: {failed}", log)
    assert "has ended: process" not in log  # Each names the first that failed.


def _processes_of(tool):
    """Returns the processes that run a tool, and not those that have started them."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # It has ended.
            continue
        if words[1:3] == [b"-m", f"xlstm.tools.{tool}".encode()]:
            found.add(int(path.parent.name))
    return found


_ASKED_TWICE = """
import os, sys, threading, time
from xlstm.trainer.base.signals import on_stop_signal

if os.environ.get("SLURM_RESTART_COUNT"):
    sys.exit(0)
asked = threading.Event()
with on_stop_signal(lambda name: asked.set()):
    print("begins", flush=True)
    asked.wait()
    time.sleep(1)
    print("saved", flush=True)
os._exit(75)
"""


def test_two_sigterms_of_slurm_leave_the_time_to_save(tmp_path):
    # Without a grace time, SLURM's controller and srun each send one.
    (tmp_path / "asked.py").write_text(_ASKED_TWICE)
    environment = install_command(tmp_path)
    with _short_folder() as short, slurm_cluster(short, grace_seconds=0) as variables:
        cluster = _Cluster(tmp_path, environment | variables)
        tool = f"{tmp_path}/xlstm-python {tmp_path}/asked.py"
        job = cluster.submit("asked", XLSTM_TRAIN=tool)
        wait_until(lambda: cluster.log("asked").count("begins") == 4)
        cluster.preempt()
        found = cluster.wait_for_state(job, *_ENDED)
        assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")
        assert "DUE TO PREEMPTION" in cluster.log("asked")
        assert cluster.log("asked").count("saved") == 4


# What stands in for the tool ends like this.
@pytest.mark.parametrize(
    "script, state, restarts",
    [
        ("exit 0", "COMPLETED", 0),
        ("exit 2", "FAILED", 0),
        ("kill -KILL $$", "FAILED", 0),
        # As in a run that is preempted, before and after it can save a checkpoint.
        ('[ "$SLURM_RESTART_COUNT" ] || kill -TERM $$', "COMPLETED", 1),
        ('[ "$SLURM_RESTART_COUNT" ] || exit 75', "COMPLETED", 1),
    ],
)
def test_how_a_job_ends(cluster, script, state, restarts, request):
    tool = cluster.folder / f"tool{len(os.listdir(cluster.folder))}"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    job = cluster.submit(tool.name, XLSTM_TRAIN=str(tool))
    found = cluster.wait_for_state(job, *_ENDED)
    assert (found["JobState"], int(found["Restarts"])) == (state, restarts)


def test_a_job_whose_time_is_nearly_over_is_asked_to_stop_and_starts_again(cluster):
    tool = cluster.folder / "slow"
    until_term = "trap 'exit 75' TERM\nwhile :; do sleep 0.1; done\n"
    tool.write_text(f'#!/bin/sh\n[ "$SLURM_RESTART_COUNT" ] && exit 0\n{until_term}')
    tool.chmod(0o755)
    options = ["--time=1", "--signal=TERM@50"]  # In minutes, and in seconds.
    job = cluster.submit("slow", options=options, XLSTM_TRAIN=str(tool))
    found = cluster.wait_for_state(job, *_ENDED)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1")


def test_a_cancelled_job_stays_cancelled(cluster):
    tool = cluster.folder / "patient"
    tool.write_text("#!/bin/sh\ntrap 'exit 75' TERM\necho begins\nwhile :; do sleep 0.1; done\n")
    tool.chmod(0o755)
    job = cluster.submit("cancelled", XLSTM_TRAIN=str(tool))
    wait_until(lambda: cluster.log("cancelled").count("begins") == 4)
    cluster.run("scancel", job)
    found = cluster.wait_for_state(job, *_ENDED)
    wait_until(lambda: not cluster.run("squeue", "--noheader", "--jobs", job))
    found = cluster.job(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")


def _error(cluster, *words):
    """Runs words in a job of two tasks that must fail; returns the status and the errors."""
    done = subprocess.run(
        ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=1", *words],
        cwd=cluster.folder,
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, [x for x in done.stderr.splitlines() if x.startswith("error: ")]


# With `salloc` alone, a site may start its shell as a step of one task.
_SHELL = ["srun", "--interactive", "--preserve-env", "--ntasks=1", "--nodes=1"]


@pytest.mark.parametrize("launcher", [[], _SHELL], ids=["job", "shell"])
def test_a_command_without_srun(cluster, launcher):
    words = ["xlstm-lm", "train", "--distributed", *train_flags(Path("no"), cluster.store)]
    assert _error(cluster, *launcher, *words) == (
        2,
        [
            "error: --distributed in a SLURM job, but not in a task of srun, so this process would"
            " wait for others that never come: put srun before the command"
        ],
    )


def test_a_port_that_is_taken(cluster):
    flags = [*train_flags(Path("no"), cluster.store), "--connect_seconds=10"]
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        words = ["env", f"JAX_COORDINATOR_PORT={port}", "xlstm-lm", "train", "--distributed"]
        status, errors = _error(cluster, "srun", "--ntasks=1", *words, *flags)
    assert status == 2
    assert errors[0].startswith(f"error: process 0 cannot listen at port {port} (Address already")
    assert errors[0].endswith("under --distributed, JAX_COORDINATOR_PORT")


def test_a_task_that_never_comes(cluster):
    flags = " ".join([*train_flags(Path("no"), cluster.store), "--connect_seconds=5"])
    command = f'[ "$SLURM_PROCID" = 1 ] || exec xlstm-lm train --distributed {flags}'
    status, errors = _error(cluster, "srun", "sh", "-c", command)
    assert status == 2
    (error,) = errors
    assert re.match("error: of 2 processes, these have not connected within 5 s: 1; start", error)


@pytest.mark.skipif(not shutil.which("mpirun"), reason="Open MPI is not installed")
def test_mpirun_in_a_job_gives_each_process_its_index(cluster):
    script = cluster.folder / "index.py"
    script.write_text(
        "from xlstm.tools.cluster_environment import find_cluster\n"
        "found = find_cluster(1)\n"
        "print(found.num_processes, found.process_id, found.coordinator_address, flush=True)\n"
    )
    mpirun = f"--wrap=mpirun --allow-run-as-root xlstm-python {script}"
    cluster.run("sbatch", "--wait", *_SIZES, "--output=index.log", mpirun)
    lines = [line.split() for line in cluster.log("index").splitlines()]
    assert sorted(line[:2] for line in lines) == [["4", str(index)] for index in range(4)]
    assert len({line[2] for line in lines}) == 1


def test_srun_leaves_the_characters_of_a_line_whole(cluster):
    # Srun cuts lines of more than 1,024 bytes, between any two of them.
    line = "─" * 341 + "\n"
    script = cluster.folder / "wide.py"
    script.write_text(
        "import os, sys\n"
        "from xlstm.trainer.base.steady_output import make_steady\n"
        "out, err = make_steady(sys.stdout), make_steady(sys.stderr)\n"
        "is_first = os.environ['SLURM_PROCID'] == '0'\n"
        "for _ in range(300):\n"
        f"    print({line!r} * 2 if is_first else 'x\\n',\n"
        "          end='', file=out if is_first else err, flush=True)\n"
    )
    srun = f"--wrap=srun xlstm-python {script}"
    cluster.run("sbatch", "--wait", *_SIZES, "--output=wide.log", srun)
    found = cluster.log("wide").splitlines(keepends=True)
    assert found.count(line) == 600 and found.count("x\n") == 900


def test_a_folder_whose_path_is_too_long_for_a_socket(tmp_path):
    long = tmp_path / ("x" * 60)
    long.mkdir()
    with pytest.raises(OSError, match="expected a path of at most 60 bytes"):
        up(long)
    assert not list(long.iterdir())


def test_the_page_shows_the_recipe():
    page = Path(__file__).parents[2] / "docs" / "clusters.md"
    assert f"```bash\n{_RECIPE.read_text()}```\n" in page.read_text()
