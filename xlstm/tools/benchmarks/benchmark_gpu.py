"""Checks and times the mLSTM on one Hopper GPU, in under five minutes, and prints one table.

    bazel run --config=cuda //xlstm/tools:benchmark_gpu -- --json=figures.json

Errors against the recurrence, the tests of the backends on the GPU, and losses of a small run
against those of a CPU run at the same time. Kernels, the XLA program and, if they are installed,
the kernels of mlstm_kernels, and training steps of `xlstm:400M` and `xlstm:1.4B` are timed alone.
The groups run in the order of their worth, each in processes of its own with a time limit of its
own, so that a kernel that hangs or breaks its CUDA context does not affect the others.

Kernels get arrays `(B * NH, T, ...)`: see `backends.random_inputs`. `of sheet` is the least time
for the useful operations, with chunks of 64 tokens, and for the bytes of inputs and outputs, at the
rates of an H100's data sheet, over the measured time; `of measured` uses the rates of the large
product and the copy in the first rows instead.

`--dry_run` runs the same groups on the CPU, at tiny sizes. From JAX 0.12 on, it interprets the
kernels, except in training steps and runs, which take the XLA program.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
from absl import flags

from xlstm.files import write_atomically
from xlstm.tools.benchmarks import gpu_groups
from xlstm.tools.benchmarks.gpu_groups import GROUPS
from xlstm.tools.benchmarks.gpu_rows import Row, rows_table, with_fractions
from xlstm.tools.command_line import output_path, print_note, print_table, run

_GROUPS = flags.DEFINE_list(
    "groups", list(GROUPS), "Groups to run. Those of one stage run at the same time."
)
_BUDGET = flags.DEFINE_float(
    "budget", 290.0, "Seconds for everything; groups that no longer fit are skipped."
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Runs the groups on the CPU, at tiny sizes.")
_JSON = flags.DEFINE_string("json", None, "File to write the rows to, as a list of objects.")

# Groups of one stage run at the same time, since they time nothing.
_STAGES = (("check", "tests", "losses"), ("target",), ("small",), ("400M",), ("few",), ("1.4B",))
_DRY_PATIENCE = 6  # A dry run may take this many times as long, on a machine that is busy.
_LEAST_SECONDS = 20.0  # A group is not started for less.


def main(argv: list[str]) -> None:
    """Runs the groups, prints the table, and writes the rows."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    for name in _GROUPS.value:
        if name not in GROUPS:
            raise ValueError(f"--groups={name} is unknown; expected some of {', '.join(GROUPS)}")
    json_path = output_path("json", _JSON.value)
    if _DRY_RUN.value and not gpu_groups.CAN_INTERPRET:
        print_note(
            f"jax {jax.__version__} cannot interpret the kernels, and 0.12 can: this dry run takes"
            " the XLA program alone"
        )
    patience = _DRY_PATIENCE if _DRY_RUN.value else 1
    deadline = time.monotonic() + _BUDGET.value * patience
    with tempfile.TemporaryDirectory() as folder:
        rows_path = os.path.join(folder, "rows.jsonl")
        for stage in _STAGES:
            names = [name for name in stage if name in _GROUPS.value]
            run_stage(names, rows_path, deadline - time.monotonic(), dry_run=_DRY_RUN.value)
            rows = with_fractions(_read_rows(rows_path))
            if json_path:
                write_atomically(json_path, json.dumps(rows, indent=2) + "\n")
    print_table(rows_table(rows))
    if any(row.get("ok") is False for row in rows):
        sys.exit(1)


def run_stage(names: Sequence[str], rows_path: str, seconds: float, *, dry_run: bool) -> None:
    """Runs groups at the same time, each in a process of its own, until their limits.

    Args:
        names: Names of groups.
        rows_path: The file to which the groups append their rows. A group that fails, or that is
            stopped at its limit or not started for lack of time, has a row that says so.
        seconds: Time that is left for the groups.
        dry_run: Whether to run them on the CPU, at tiny sizes.
    """
    env = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # Groups share the memory.
    }
    if dry_run:
        env["JAX_PLATFORMS"] = "cpu"
    if len(names) > 1:  # They time nothing, so that XLA need not look for the fastest products.
        env["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    start, processes = time.monotonic(), {}
    for name in names:
        limit = min(GROUPS[name].seconds * (_DRY_PATIENCE if dry_run else 1), seconds)
        if limit < _LEAST_SECONDS:
            _append(rows_path, name, f"skipped: {seconds:.0f} s are left")
            continue
        words = [name, rows_path, str(limit), *["dry_run"] * dry_run]
        command = [sys.executable, "-m", gpu_groups.__name__, *words]
        # A session of its own, so that processes which it starts end with it.
        process = subprocess.Popen(command, env=os.environ | env, start_new_session=True)
        processes[name] = limit, process
    try:
        for name, (limit, process) in processes.items():
            try:
                status = process.wait(max(start + limit - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _append(rows_path, name, f"stopped at its limit of {limit:.0f} s")
            else:
                if status not in (0, 1):  # With 1 it has told the reason.
                    _append(rows_path, name, f"FAILED with exit status {status}")
    finally:
        for _, process in processes.values():
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # All have ended.
    process.wait()


def _append(rows_path: str, name: str, result: str) -> None:
    row = {"group": name, "what": f"group {name}", "result": result, "ok": False}
    print(f"[{name}] {result}", flush=True)
    with open(rows_path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _read_rows(path: str) -> list[Row]:
    """Reads the rows; the last line of a group that was stopped may be incomplete."""
    rows = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
    return rows


if __name__ == "__main__":
    run(main)
