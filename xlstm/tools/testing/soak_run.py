"""A run for the soak: its starts and ends, and the checks of its results."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from xlstm.dataset.testing import write_store
from xlstm.testing.quick_compilation import QUICK_XLA_FLAGS
from xlstm.tools import train
from xlstm.trainer.callbacks.metrics import SPEEDS

_SECONDS = 300  # A run that has not ended by then hangs.
# The key of the metrics that marks a lost terminal.
TERMINAL_LOST = "terminal_lost"


class RunIsOver(Exception):
    """A run that ended before it could be injured."""


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """The configuration of an injured run.

    Attributes:
        num_processes: 1, or 2 that shard the parameters (fsdp).
        num_steps: Number of steps.
        checkpoint_interval: Steps between checkpoints.
        eval_interval: Steps between evaluations; not a divisor of `num_steps`.
        steps_between_injuries: Mean number of steps between injuries.
    """

    num_processes: int = 1
    num_steps: int = 400
    checkpoint_interval: int = 10
    eval_interval: int = 70
    steps_between_injuries: int = 20


class HurtRun:
    """A run that can be started, injured and checked.

    Attributes:
        name: The name of the run's folder.
        path: The run's folder.
        store: The token store that it trains on.
        config: The run's configuration.
        rng: Chooses moments and everything else that is random.
        processes: The processes of the last start.
    """

    def __init__(self, folder: str, name: str, config: SoakConfig, rng: random.Random):
        """Makes the object; nothing is written or started yet.

        Args:
            folder: The folder of this run and others.
            name: The name of the run's own folder.
            config: The run's configuration.
            rng: Chooses the moments.
        """
        self.name, self.path = name, os.path.join(folder, name)
        self.store = os.path.join(folder, "store")
        self.config, self.rng = config, rng
        self.processes: list[subprocess.Popen] = []
        self._folder = folder
        self._damaged: dict[int, int] = {}  # The inodes of damaged checkpoints by step.
        self._port = 0
        self._first_row = 0
        self._expected: tuple[list[int], list[int], list[int]] = [], [], []

    def start(
        self, *words: str, last: Sequence[str] = (), tool: ModuleType = train, **options: Any
    ) -> None:
        """Starts all processes.

        Args:
            *words: Further flags.
            last: Further flags of the last process only.
            tool: The module that trains.
            **options: Options of `launch` for the first process.
        """
        self.prepare()
        end = self.config.num_processes - 1
        for index in range(end + 1):
            more = last if index == end else ()
            self.launch(index, *words, *more, tool=tool, **(options if index == 0 else {}))

    def prepare(self) -> None:
        """Notes what a start must do; call it before the first process is launched."""
        self.processes = []
        self._first_row = self.last_row_step()
        confirmed = self.confirmed_steps()
        newest = max(confirmed, default=0)
        damaged = [step for step in self._still_damaged() if step > newest]
        unconfirmed = [step for step in self._whole_steps() if step > newest]
        self._expected = confirmed, damaged, unconfirmed
        with socket.socket() as server:
            server.bind(("localhost", 0))
            self._port = server.getsockname()[1]
        for index in range(self.config.num_processes):
            with open(self.log_path(index), "w"):
                pass

    def launch(
        self,
        index: int,
        *words: str,
        tool: ModuleType = train,
        output: IO[Any] | int | None = None,
        errors: IO[Any] | int | None = None,
        cwd: str | None = None,
    ) -> subprocess.Popen:
        """Starts a process.

        Args:
            index: The process's index.
            *words: Further flags.
            tool: The module that trains.
            output: Destination of the standard output; by default the log.
            errors: Destination of the standard error; by default the log.
            cwd: Working folder, in which it finds the store; by default the folder of the runs.

        Returns:
            The process.
        """
        env = os.environ | {
            # Its working folder differs from this program's.
            "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]),
            "XDG_CACHE_HOME": os.path.join(self._folder, "cache"),
        }
        if self.config.num_processes == 1:
            env |= {
                "JAX_COMPILATION_CACHE_DIR": os.path.join(self._folder, "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
        else:  # JAX caches the programs of process 0 only, and then both may deadlock.
            env |= {"XLA_FLAGS": QUICK_XLA_FLAGS}
        with open(self.log_path(index), "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", tool.__name__, *self._words(index), *words],
                stdout=log if output is None else output,
                stderr=log if errors is None else errors,
                cwd=cwd or self._folder,
                env=env,
            )
        self.processes.append(process)
        return process

    def _words(self, index: int) -> list[str]:
        config = self.config
        words = [
            f"--workdir={self.path}",
            "--config=smoke",
            f"--config.data.stores={self.store}",
            "--config.data.context_length=16",
            f"--config.trainer.num_steps={config.num_steps}",
            f"--config.trainer.checkpoint_interval={config.checkpoint_interval}",
            f"--config.trainer.eval_interval={config.eval_interval}",
            "--config.trainer.max_checkpoints=3",
            "--config.logger.sample_tokens=0",
        ]
        if config.num_processes > 1:
            words += [
                # The same path in all processes, but not necessarily the same folder.
                "--config.data.stores=/proc/self/cwd/store",
                f"--config.mesh.fsdp={config.num_processes}",
                "--simulate_devices=1",
                f"--coordinator_address=localhost:{self._port}",
                f"--num_processes={config.num_processes}",
                f"--process_id={index}",
            ]
        return words

    def wait_for_moment(self, *, in_training: bool = False) -> bool:
        """Waits for a random number of steps, or sometimes for a random time after the start.

        Args:
            in_training: Whether to wait for steps only.

        Returns:
            Whether this start has done a step.

        Raises:
            RunIsOver: If the run ends first.
        """
        begin, rng = time.monotonic(), self.rng
        steps = rng.randint(0, 2 * self.config.steps_between_injuries)
        seconds = rng.uniform(0, 8) if rng.random() < 0.1 and not in_training else _SECONDS
        while time.monotonic() - begin < seconds:
            if self.last_row_step() > self._first_row + steps:
                return True
            self.check_runs()
            time.sleep(rng.uniform(0.001, 0.05))
        self.check(seconds < _SECONDS, "hangs before its first step")
        return False

    def wait_for_steps(self, steps: int) -> None:
        """Waits for a number of further steps; raises RunIsOver if the run ends first."""
        begin, first = time.monotonic(), self.last_row_step()
        while self.last_row_step() < first + steps:
            self.check_runs()
            self.check(time.monotonic() - begin < _SECONDS, "hangs")
            time.sleep(0.02)

    def check_runs(self) -> None:
        """Raises RunIsOver if the first process has ended."""
        if self.processes[0].poll() is not None:
            raise RunIsOver

    def send(self, number: int, index: int | None = None) -> None:
        """Sends a signal to a process, or to all."""
        for process in self.processes if index is None else [self.processes[index]]:
            process.send_signal(number)

    def kill(self) -> None:
        """Kills all processes and checks what their start did."""
        self.send(signal.SIGKILL)
        self.join()

    def join(self, seconds: float = _SECONDS) -> list[int]:
        """Waits until all processes have exited and checks what their start did.

        Args:
            seconds: The longest time to wait.

        Returns:
            The exit statuses of the processes.
        """
        statuses = self.wait(seconds)
        self._check_start()
        return statuses

    def wait(self, seconds: float = _SECONDS) -> list[int]:
        """Waits until all processes have exited; returns their exit statuses."""
        end = time.monotonic() + seconds
        try:
            return [x.wait(timeout=max(end - time.monotonic(), 0)) for x in self.processes]
        except subprocess.TimeoutExpired:
            raise self.failure(f"has not ended after {seconds} seconds") from None
        finally:
            for process in self.processes:
                process.kill()

    def finish(self) -> None:
        """Waits until the run has finished; raises AssertionError if it failed."""
        statuses = self.join()
        self.check(not any(statuses), f"ended with {statuses}")

    def log(self, index: int = 0) -> str:
        """Returns what a process has printed since its last start."""
        with open(self.log_path(index), encoding="utf-8", errors="replace") as file:
            return file.read()

    def errors(self) -> list[str]:
        """Returns the error lines of all processes, those of process 0 first."""
        logs = [self.log(index) for index in range(self.config.num_processes)]
        return [line for log in logs for line in re.findall(r"^error: .*", log, re.MULTILINE)]

    def log_path(self, index: int) -> str:
        """Returns the path of a process's log."""
        return f"{self.path}.{index}.log"

    def files(self) -> dict[str, tuple[int, int]]:
        """Returns the size and modification time of each of the run's files."""
        found = {}
        for root, _, names in os.walk(self.path):
            for name in names:
                status = os.stat(os.path.join(root, name))
                found[os.path.join(root, name)] = status.st_size, status.st_mtime_ns
        return found

    def last_row_step(self) -> int:
        """Returns the step of the last row of the metrics; 0 without rows."""
        path = os.path.join(self.path, "metrics.jsonl")
        try:
            with open(path, "rb") as file:
                file.seek(max(os.path.getsize(path) - 4096, 0))
                return int(re.findall(rb'\{"step": (\d+),', file.read())[-1])
        except (OSError, IndexError):
            return 0

    def checkpoint_path(self, step: int) -> str:
        """Returns the folder of a checkpoint."""
        return os.path.join(self.path, "checkpoints", str(step))

    def is_writing(self) -> bool:
        """Returns whether a checkpoint is being written."""
        return any(name.endswith(".unfinished") for name in self._checkpoint_names())

    def _checkpoint_names(self) -> list[str]:
        folder = os.path.join(self.path, "checkpoints")
        return os.listdir(folder) if os.path.isdir(folder) else []

    def _whole_steps(self) -> list[int]:
        steps = sorted(int(name) for name in self._checkpoint_names() if name.isdigit())
        damaged = self._still_damaged()
        return [
            step
            for step in steps
            if step not in damaged
            and os.path.exists(os.path.join(self.checkpoint_path(step), "checksums.json"))
        ]

    def confirmed_steps(self) -> list[int]:
        """Returns the steps of the checkpoints that a start may resume from, ascending."""
        return [step for step in self._whole_steps() if self._is_confirmed(step)]

    def _is_confirmed(self, step: int) -> bool:
        path = os.path.join(self.checkpoint_path(step), "run_info.json")
        with open(path, encoding="utf-8") as file:
            return json.load(file).get("confirmed", True)

    def mark_damaged(self, step: int) -> None:
        """Notes that a checkpoint is damaged; one written in its place later is not."""
        self._damaged[step] = os.stat(self.checkpoint_path(step)).st_ino

    def _still_damaged(self) -> list[int]:
        def is_there(step: int) -> bool:
            path = self.checkpoint_path(step)
            return os.path.isdir(path) and os.stat(path).st_ino == self._damaged[step]

        return [step for step in self._damaged if is_there(step)]

    def _check_start(self) -> None:
        """Checks that the last start, if it got there, resumed from the right checkpoint."""
        confirmed, damaged, unconfirmed = self._expected
        newest = max(confirmed, default=0)
        log = self.log()
        found = re.search(r"resuming from step ([\d,]+)", log)
        if found:
            step = int(found[1].replace(",", ""))
            self.check(step == newest, f"resumed from {step}, not from {newest}")
            for what, steps in ("damaged", damaged), ("not confirmed", unconfirmed):
                for step in steps:
                    is_named = re.search(f"step {step:,} is {what}|step {step} is {what}", log)
                    self.check(is_named, f"did not say that the checkpoint of {step} is {what}")
        elif confirmed:
            # It was injured before it printed anything, unless it wrongly started from scratch.
            rows = self.rows()
            steps = [row["step"] for row in rows]
            self.check(steps == sorted(steps) and steps[0] == 0, "lost rows")
            self.check(steps[-1] >= newest, "started from scratch")

    def rows(self) -> list[dict[str, Any]]:
        """Returns the metrics without those that differ when a run is repeated."""
        rows = [{key: row[key] for key in row if key not in SPEEDS} for row in self.all_rows()]
        return [row for row in rows if row.keys() != {"step"}]

    def all_rows(self) -> list[dict[str, Any]]:
        """Returns the metrics."""
        with open(os.path.join(self.path, "metrics.jsonl"), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the state at the end of the run, by name."""
        path = os.path.join(self.checkpoint_path(self.config.num_steps), "state")
        with ocp.StandardCheckpointer() as checkpointer:
            return jax.tree.map(np.asarray, checkpointer.restore(os.path.abspath(path)))

    def compare(self, expected: "HurtRun") -> None:
        """Raises AssertionError if this finished run differs from another one."""
        rows, wanted = self.rows(), expected.rows()
        steps = [row["step"] for row in rows if "loss" in row]
        self.check(steps == list(range(1, self.config.num_steps + 1)), f"has steps {steps}")
        differing = [(x, y) for x, y in zip(rows, wanted, strict=False) if x != y]
        self.check(rows == wanted, f"has other metrics: {differing[:1]}")
        found, arrays = self.arrays(), expected.arrays()
        self.check(found.keys() == arrays.keys(), "has other arrays")
        different = [name for name in arrays if not np.array_equal(found[name], arrays[name])]
        self.check(not different, f"has another final state: {different}")

    def check(self, condition: Any, message: str) -> None:
        """Raises AssertionError if a condition does not hold."""
        if not condition:
            raise self.failure(message)

    def failure(self, message: str) -> AssertionError:
        """Returns an exception that says what is wrong."""
        return AssertionError(f"{self.name} {message}; everything is in {self._folder}")


def write_soak_store(folder: str) -> None:
    """Writes the token store of the runs in a folder."""
    words = [f"x{i} = {i}\n" * 40 for i in range(50)]
    write_store(os.path.join(folder, "store"), words)
