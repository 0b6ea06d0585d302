"""Hurts runs until they would break: `bazel run //xlstm/tools:soak -- --injuries=200`.

A short run is made once without a disturbance. Then the same run is made again and again in new
folders, and at random moments

* killed (SIGKILL),
* asked to stop (SIGTERM), or
* killed and its newest checkpoint damaged: a byte flipped, a file cut off or removed, or its
  checksums taken away, as if the write had been torn.

Started again after each injury, it must go on from the last checkpoint that is whole. At its end
metrics and checkpoint must be those of the undisturbed run, bit for bit.
"""

import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xlstm.dataset.testing import write_store
from xlstm.tools import train
from xlstm.tools.command_line import run
from xlstm.trainer.callbacks.metrics import SPEEDS

_INJURIES = flags.DEFINE_integer("injuries", 200, "How many injuries.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the injuries and their moments.")

# A damage comes after a SIGKILL.
KINDS = ("SIGKILL", "SIGTERM", "flipped byte", "cut off", "removed", "torn")
_SECONDS = 300  # After so long without an end a run hangs.


@dataclasses.dataclass(frozen=True)
class SoakConfig:
    """The run that is hurt.

    Attributes:
        num_steps: Its length.
        checkpoint_interval: Steps between checkpoints.
        steps_between_injuries: About so many.
    """

    num_steps: int = 600
    checkpoint_interval: int = 20
    steps_between_injuries: int = 100


class Soak:
    """Runs in a folder, and what they must be like.

    Attributes:
        folder: Everything is in it.
    """

    def __init__(self, folder: str, config: SoakConfig, rng: random.Random):
        """Makes the undisturbed run.

        Args:
            folder: Where everything goes.
            config: The run.
            rng: Chooses the moments, and what is damaged.

        Raises:
            AssertionError: If it does not end well.
        """
        self.folder, self._config, self._rng = folder, config, rng
        words = [f"x{i} = {i}\n" * 40 for i in range(50)]
        write_store(os.path.join(folder, "store"), words)
        self._check(self._finish(self._start("undisturbed")) == 0, "the undisturbed run failed")
        self._rows = self._read_rows("undisturbed")
        self._arrays = self._read_arrays("undisturbed")

    def hurt(self, name: str, kinds: Sequence[str]) -> list[str]:
        """Makes a run that is hurt, and checks it.

        Args:
            name: A folder of its own.
            kinds: Injuries, of `KINDS`, in their order; then it is left in peace.

        Returns:
            The injuries that were done before the run was at its end.

        Raises:
            AssertionError: If a start or the end is not as it must be.
        """
        injuries: list[str] = []
        while True:
            expected = self._whole_steps(name)
            process = self._start(name)
            kind = kinds[len(injuries)] if len(injuries) < len(kinds) else None
            if kind is None or not self._wait_for_moment(process, name):
                status = self._finish(process)
                self._check(status == 0, f"{name} ended with status {status}")
                self._check_start(name, expected)
                break
            process.send_signal(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            status = self._finish(process)
            self._check_start(name, expected)
            if kind == "SIGTERM":
                self._check_stop(name, status)
            elif kind != "SIGKILL":
                kind = self._damage(name, kind)
            injuries.append(kind)
        self.compare(name)
        return injuries

    def _start(self, name: str) -> subprocess.Popen:
        config = self._config
        words = [
            f"--workdir={os.path.join(self.folder, name)}",
            "--config=smoke",
            f"--config.data.stores={os.path.join(self.folder, 'store')}",
            "--config.data.context_length=16",
            f"--config.trainer.num_steps={config.num_steps}",
            f"--config.trainer.checkpoint_interval={config.checkpoint_interval}",
            # No divisor of the length: there is an evaluation at the end alone.
            f"--config.trainer.eval_interval={7 * config.checkpoint_interval}",
            "--config.trainer.max_checkpoints=3",
            "--config.logger.sample_tokens=0",
        ]
        env = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": os.path.join(self.folder, "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(os.path.join(self.folder, f"{name}.log"), "w", encoding="utf-8") as log:
            return subprocess.Popen(
                [sys.executable, "-m", train.__name__, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
            )

    def _finish(self, process: subprocess.Popen) -> int:
        try:
            return process.wait(timeout=_SECONDS)
        finally:
            process.kill()

    def _wait_for_moment(self, process: subprocess.Popen, name: str) -> bool:
        """Waits until some random steps are done, or some random time is over at the start."""
        begin, first = time.monotonic(), self._last_row_step(name)
        steps = self._rng.randint(0, 2 * self._config.steps_between_injuries)
        seconds = self._rng.uniform(0, 8) if self._rng.random() < 0.1 else _SECONDS
        while process.poll() is None:
            is_over = time.monotonic() - begin > seconds
            if is_over or self._last_row_step(name) > first + steps:
                return True
            time.sleep(self._rng.uniform(0.001, 0.05))
        return False

    def _last_row_step(self, name: str) -> int:
        path = os.path.join(self.folder, name, "metrics.jsonl")
        try:
            with open(path, "rb") as file:
                file.seek(max(os.path.getsize(path) - 4096, 0))
                return int(re.findall(rb'\{"step": (\d+),', file.read())[-1])
        except (OSError, IndexError):
            return 0

    def _whole_steps(self, name: str) -> list[int]:
        folder = os.path.join(self.folder, name, "checkpoints")
        names = os.listdir(folder) if os.path.isdir(folder) else []
        paths = {int(step): os.path.join(folder, step) for step in names if step.isdigit()}
        marked = os.path.join(self.folder, f"{name}.damaged")
        damaged = {int(step) for step in os.listdir(marked)} if os.path.isdir(marked) else set()
        return sorted(
            step
            for step, path in paths.items()
            if step not in damaged and os.path.exists(os.path.join(path, "checksums.json"))
        )

    def _damage(self, name: str, kind: str) -> str:
        """Damages the newest checkpoint, unless it is the only one; returns what was done."""
        steps = self._whole_steps(name)
        if len(steps) < 2:
            return "SIGKILL"
        folder = os.path.join(self.folder, name, "checkpoints", str(steps[-1]))
        files = sorted(
            os.path.join(root, file)
            for root, _, names in os.walk(folder)
            for file in names
            if os.path.getsize(os.path.join(root, file))
        )
        victim = self._rng.choice(files)
        if kind == "torn":
            os.remove(os.path.join(folder, "checksums.json"))
        elif kind == "removed":
            os.remove(victim)
        elif kind == "cut off":
            os.truncate(victim, self._rng.randrange(os.path.getsize(victim)))
        else:
            with open(victim, "r+b") as file:
                place = self._rng.randrange(os.path.getsize(victim))
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ (1 << self._rng.randrange(8))]))
        os.makedirs(os.path.join(self.folder, f"{name}.damaged"), exist_ok=True)
        open(os.path.join(self.folder, f"{name}.damaged", str(steps[-1])), "w").close()
        return kind

    def _check_start(self, name: str, whole_steps: list[int]) -> None:
        """The last start went on from the newest whole checkpoint, if it came that far."""
        found = re.search(r"going on from step ([\d,]+)", self._log(name))
        if found:
            step = int(found[1].replace(",", ""))
            newest = max(whole_steps, default=0)
            self._check(step == newest, f"{name} went on from {step}, not from {newest}")
            shutil.rmtree(os.path.join(self.folder, f"{name}.damaged"), ignore_errors=True)
        elif whole_steps:
            # It was hurt before it said anything; or it began anew, which it must not.
            rows = self._read_rows(name)
            steps = [row["step"] for row in rows]
            self._check(steps == sorted(steps) and steps[0] == 0, f"{name} lost rows")
            self._check(steps[-1] >= whole_steps[-1], f"{name} began anew")

    def _check_stop(self, name: str, status: int) -> None:
        found = re.search(r"stopped after step ([\d,]+)", self._log(name))
        if "SIGTERM: saving" not in self._log(name):
            # It came before training had begun, or when it was over.
            self._check(status in (0, -signal.SIGTERM), f"{name} ended with status {status}")
            return
        self._check(status == 0, f"{name} stopped with status {status}")
        if found:
            step = int(found[1].replace(",", ""))
            self._check(self._whole_steps(name)[-1] == step, f"{name}: step {step} is not saved")

    def compare(self, name: str) -> None:
        """Raises AssertionError if a finished run is not as the undisturbed one."""
        rows = self._read_rows(name)
        steps = [row["step"] for row in rows if "loss" in row]
        self._check(steps == list(range(1, self._config.num_steps + 1)), f"{name}: steps {steps}")
        self._check(rows == self._rows, f"{name} has other metrics")
        arrays = self._read_arrays(name)
        self._check(
            jax.tree.structure(arrays) == jax.tree.structure(self._arrays), f"{name}: other arrays"
        )
        same = jax.tree.map(np.array_equal, arrays, self._arrays)
        self._check(all(jax.tree.leaves(same)), f"{name}: the final state differs: {same}")

    def _read_rows(self, name: str) -> list[dict]:
        with open(os.path.join(self.folder, name, "metrics.jsonl"), encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        return [{key: row[key] for key in row if key not in SPEEDS} for row in rows]

    def _read_arrays(self, name: str) -> dict:
        step = str(self._config.num_steps)
        path = os.path.join(self.folder, name, "checkpoints", step, "state")
        with ocp.StandardCheckpointer() as checkpointer:
            return jax.tree.map(np.asarray, checkpointer.restore(os.path.abspath(path)))

    def _log(self, name: str) -> str:
        with open(os.path.join(self.folder, f"{name}.log"), encoding="utf-8") as file:
            return file.read()

    def _check(self, condition: bool, message: str) -> None:
        if not condition:
            raise AssertionError(f"{message}; everything is in {self.folder}")


def main(argv: list[str]) -> None:
    """Hurts runs, and prints what was done to them."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    folder = tempfile.mkdtemp(prefix="soak-")
    console, totals, runs = Console(), collections.Counter(), 0
    rng = random.Random(_SEED.value)
    soak = Soak(folder, SoakConfig(), rng)
    columns = TextColumn("injuries"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("soak", total=_INJURIES.value)
        while totals.total() < _INJURIES.value:
            name = f"run_{runs}"
            kinds = rng.choices(KINDS, (4, 2, 1, 1, 1, 1), k=_INJURIES.value - totals.total())
            totals.update(soak.hurt(name, kinds))
            runs += 1
            shutil.rmtree(os.path.join(folder, name))
            progress.update(task, completed=totals.total())
    shutil.rmtree(folder)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(totals.items()))
    console.print(
        f"{runs} runs with {totals.total()} injuries ({kinds}): every one went on from its"
        " last whole checkpoint, and ended with the metrics and the state of the undisturbed run,"
        " bit for bit",
        highlight=False,
    )


if __name__ == "__main__":
    run(main)
