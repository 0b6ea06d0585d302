"""What `benchmark_gpu` checks and times: groups that run in processes of their own.

    python -m xlstm.tools.benchmarks.gpu_groups GROUP ROWS_FILE SECONDS [dry_run]

A group yields the rows that `gpu_rows` describes.
"""

import contextlib
import dataclasses
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import CAN_INTERPRET
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import (
    MOSAIC_CHUNK_SIZE,
    interpreted_kernels,
)
from xlstm.models.xlstm_parallel.flops import count_flops_per_token
from xlstm.tools.benchmarks.backends import time_candidates
from xlstm.tools.benchmarks.candidates import Candidate, Shape, backend_candidates
from xlstm.tools.benchmarks.gpu_accuracy import HeadShape, accuracy_rows
from xlstm.tools.benchmarks.gpu_rows import Row, failure_row, least_bytes, useful_operations
from xlstm.tools.benchmarks.peers import PEER_CHUNK_SIZES, PEERS, peer_candidates
from xlstm.tools.benchmarks.timed import PASSES, TimedFunction
from xlstm.tools.benchmarks.train_step import time_train_step
from xlstm.tools.config import load_config, to_run_config
from xlstm.trainer.logger.jsonl import read_rows

_REPEATS, _DRY_REPEATS = 20, 1
_LOSS_STEPS, _DRY_LOSS_STEPS = 50, 3
_MARGIN = 8.0  # Seconds that remain of a group's limit to report what processes did.
_LOSS_LIMIT = 1e-3  # Of float32, between devices.


class Setting(NamedTuple):
    """How a group runs.

    Attributes:
        seconds: Time limit of the group.
        dry_run: Whether to run on a CPU, at tiny sizes.
    """

    seconds: float
    dry_run: bool

    @property
    def cells(self) -> list[str]:
        """Programs of `fwbw` to compare by themselves; the last one runs everywhere."""
        return ["xla"] if self.dry_run and not CAN_INTERPRET else ["mosaic", "xla"]

    @property
    def models(self) -> list[str]:
        """Programs of `fwbw` to train with; in a scan over blocks, kernels are not interpreted."""
        return ["xla"] if self.dry_run else ["mosaic", "xla"]


def check(setting: Setting) -> Iterator[Row]:
    """Compares outputs, states and gradients with the recurrence."""
    shapes = [(512, 256, 512), (512, 64, 128), (200, 40, 72), (200, 256, 512)]
    if setting.dry_run:
        shapes = [(128, 64, 64)]
    yield from accuracy_rows([HeadShape(*shape) for shape in shapes], setting.cells)


def yardsticks(setting: Setting) -> Iterator[Row]:
    """Times a large product and a copy, in bfloat16."""
    size = 64 if setting.dry_run else 8192
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(0), (8, *x.shape), jnp.bfloat16)
    for what, function, array, work in (
        ("product", lambda x: x @ x, x, {"operations": 2 * size**3}),
        ("copy", lambda x: x + jnp.ones((), x.dtype), y, {"bytes": 2 * y.nbytes}),
    ):
        compiled = jax.jit(function).lower(array).compile()
        call = lambda compiled=compiled, array=array: compiled(array)  # noqa: E731
        jax.block_until_ready(call())
        timed = TimedFunction(call, jax.block_until_ready, 0.0, 0)
        for _ in range(_DRY_REPEATS if setting.dry_run else _REPEATS):
            timed.run(calls=3)
        shape = "x".join(map(str, array.shape))
        yield {"what": what, "program": f"XLA, {shape}", "ms": np.median(timed.times) * 1e3} | work


def target(setting: Setting) -> Iterator[Row]:
    """Times large heads."""
    yield from yardsticks(setting)
    yield from _time_kernels(Shape(8, 8, 8192, 256, 512), setting)


def small(setting: Setting) -> Iterator[Row]:
    """Times small heads."""
    yield from _time_kernels(Shape(16, 8, 4096, 64, 128), setting)


def few(setting: Setting) -> Iterator[Row]:
    """Times few long sequences."""
    yield from _time_kernels(Shape(1, 4, 32768, 256, 512), setting)


def _time_kernels(shape: Shape, setting: Setting) -> Iterator[Row]:
    """Times the programs of `fwbw` in turn, then the first of them and other libraries in turn."""
    if setting.dry_run:
        shape = Shape(1, 1, 64, 8, 16)
    try:  # Before JAX starts the devices.
        peers = [x for name in PEERS for x in peer_candidates(name, PEER_CHUNK_SIZES, shape)]
        missing = ""
    except ValueError as error:
        peers, missing = [], str(error)
    ours = backend_candidates(
        BackendConfig(),
        dict.fromkeys([BackendConfig().chunk_size, MOSAIC_CHUNK_SIZE]),
        setting.cells,
        shape,
        jnp.bfloat16,
    )
    yield from _time_in_turn(shape, ours, setting)
    if peers:
        rows = list(_time_in_turn(shape, [ours[0], *peers], setting))
        yield from ({**row, "what": f"{row['what']}, beside peers"} for row in rows)
        yield from compare_with_peers(rows)
    else:
        yield {"what": str(shape), "program": ", ".join(PEERS), "result": f"not timed: {missing}"}


def _time_in_turn(shape: Shape, candidates: Sequence[Candidate], setting: Setting) -> Iterator[Row]:
    failures: list[Row] = []

    def fail(candidate: Candidate, error: Exception) -> None:
        failures.append(
            _label(candidate.name, candidate.implementation) | failure_row(shape, error)
        )

    repeats = _DRY_REPEATS if setting.dry_run else _REPEATS
    for figures in time_candidates(
        shape, candidates, jnp.bfloat16, repeats, lambda: None, on_failure=fail
    ):
        for name in PASSES:
            yield _label(figures["backend"], figures["implementation"]) | {
                "what": f"{shape}, {name.replace('_', ' + ')}",
                "pass": name,
                "chunk_size": figures["chunk_size"],
                "ms": figures[f"{name}_median_ms"],
                "min_ms": figures[f"{name}_min_ms"],
                "compile_s": figures[f"{name}_compile_s"],
                "memory_mib": figures[f"{name}_temporary_memory_mib"],
                "operations": useful_operations(shape, name),
                "bytes": least_bytes(shape, name),
            }
    yield from failures


def _label(backend: str, implementation: str) -> Row:
    return {"program": implementation if backend == "fwbw" else f"{backend} {implementation}"}


def compare_with_peers(rows: Sequence[Row]) -> Iterator[Row]:
    """Yields how many times as fast as the best of the peers our program is."""
    for name in PASSES:
        timed = [row for row in rows if row.get("pass") == name]
        ours = [row for row in timed if not row["program"].startswith(PEERS)]
        others = [row for row in timed if row["program"].startswith(PEERS)]
        if ours and others:
            best = min(others, key=lambda row: row["ms"])
            yield {
                "what": ours[0]["what"],
                "program": ours[0]["program"],
                "result": f"{best['ms'] / ours[0]['ms']:.2f} times as fast as {best['program']},"
                f" chunk {best['chunk_size']}",
            }


def steps_400m(setting: Setting) -> Iterator[Row]:
    """Times training steps of `xlstm:400M`."""
    yield from _time_steps("xlstm:400M", 16, setting)


def steps_1b(setting: Setting) -> Iterator[Row]:
    """Times training steps of `xlstm:1.4B`."""
    yield from _time_steps("xlstm:1.4B", 8, setting)


def _time_steps(name: str, batch_size: int, setting: Setting) -> Iterator[Row]:
    name = "smoke" if setting.dry_run else name
    values = load_config(name)
    if not setting.dry_run:
        values.data.context_length, values.data.batch_size = 2048, batch_size
    for implementation in setting.models:
        values.backend.implementation = implementation
        config = to_run_config(values)
        label = {"what": f"training step, {name}", "program": implementation}
        try:
            figures = time_train_step(config, 1 if setting.dry_run else 5, lambda: None)
        except Exception as error:  # The other program remains.
            yield failure_row(label["what"], error) | label
            continue
        tokens = config.data.batch_size * config.data.context_length
        flops = count_flops_per_token(config.language_model, config.data.context_length)
        yield label | {
            "ms": figures["step_median_ms"],
            "min_ms": figures["step_min_ms"],
            "compile_s": figures["compile_s"],
            "memory_mib": figures["temporary_memory_mib"],
            "operations": tokens * flops,
            "result": f"{figures['tokens_per_s']:,.0f} tokens/s",
        }
        jax.clear_caches()


def tests(setting: Setting) -> Iterator[Row]:
    """Runs the numerical tests of the backends on the device."""
    folder = os.path.dirname(testing.__file__)
    files = sorted(glob.glob(os.path.join(folder, "*_test.py")))
    files = [file for file in files if not file.endswith("grid_test.py")]  # They take minutes.
    if setting.dry_run:
        files = [file for file in files if os.path.basename(file) == "gates_test.py"]
    words = ["xlstm.testing.pytest_main", "-q", "--tb=no", "-rfE", *files]
    env = {} if setting.dry_run else {"JAX_PLATFORMS": "cuda"}
    with tempfile.TemporaryFile("w+") as output:
        status = _wait(_start(words, env, output), time.monotonic() + setting.seconds - _MARGIN)
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    result = "; ".join([*lines[-1:], *failed[:3]])
    yield {"what": "tests of the backends", "result": result, "ok": status == 0}


def losses(setting: Setting) -> Iterator[Row]:
    """Compares the losses of the first steps of `stdlib_tiny` on the device and on the CPU."""
    deadline, cpu = time.monotonic() + setting.seconds - _MARGIN, {"JAX_PLATFORMS": "cpu"}
    card = cpu if setting.dry_run else {"JAX_PLATFORMS": "cuda"}
    bfloat16 = "--config.model.dtype=bfloat16"
    runs = {"CPU, float32": (cpu, []), "float32": (card, [])}
    for name in setting.models:
        runs[f"bfloat16, {name}"] = card, [bfloat16, f"--config.backend.implementation={name}"]
    with tempfile.TemporaryDirectory() as folder:
        processes, curves = {}, {}
        for name, (env, flags) in runs.items():
            workdir = os.path.join(folder, name)
            words = _training_words(workdir, setting.dry_run)
            with open(f"{workdir}.txt", "w", encoding="utf-8") as output:
                processes[name] = workdir, _start([*words, *flags], env, output)
        for name, (workdir, process) in processes.items():
            if _wait(process, deadline):
                with open(f"{workdir}.txt", encoding="utf-8") as output:
                    last = output.read().splitlines()[-1:]
                yield {"what": "losses", "program": name, "ok": False, "result": "".join(last)}
                continue
            rows = read_rows(os.path.join(workdir, "metrics.jsonl"))
            curves[name] = np.array([row["loss"] for row in rows if "loss" in row])
    reference = curves.pop("CPU, float32", None)
    for name, curve in curves.items() if reference is not None else ():
        difference = np.abs(curve - reference)
        row = {
            "what": f"losses of {len(curve)} steps against the CPU's in float32",
            "program": name,
            "result": f"largest difference {difference.max():.1e}, last {difference[-1]:.1e}",
        }
        yield row | ({"ok": bool(difference.max() < _LOSS_LIMIT)} if name == "float32" else {})


def _training_words(workdir: str, dry_run: bool) -> list[str]:
    options = {
        "trainer.num_steps": _DRY_LOSS_STEPS if dry_run else _LOSS_STEPS,
        "trainer.eval_interval": 1000,
        "trainer.eval_batches": 1,
        "trainer.checkpoint_interval": 1000,
        "logger.interval": 1,
        "logger.sample_tokens": 0,
    }
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    config = "smoke" if dry_run else "stdlib_tiny"
    return ["xlstm.tools.train", f"--config={config}", f"--workdir={workdir}", *flags]


def _start(words: Sequence[str], env: dict[str, str], output: TextIO) -> subprocess.Popen:
    """Starts a module of Python; its output goes to a file."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | env
    command = [sys.executable, "-m", *words]
    return subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)


def _wait(process: subprocess.Popen, deadline: float) -> int:
    """Waits for a process until a time of the monotonic clock; returns its exit status."""
    try:
        return process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


@dataclasses.dataclass(frozen=True)
class Group:
    """A group.

    Attributes:
        run: Yields its rows.
        seconds: Its time limit.
    """

    run: Callable[[Setting], Iterator[Row]]
    seconds: float


GROUPS = {
    "check": Group(check, 100),
    "tests": Group(tests, 100),
    "losses": Group(losses, 100),
    "target": Group(target, 95),
    "small": Group(small, 65),
    "400M": Group(steps_400m, 80),
    "few": Group(few, 50),
    "1.4B": Group(steps_1b, 80),
}


def run_group(name: str, path: str, setting: Setting) -> None:
    """Runs a group; appends its rows to a file, one JSON object a line, and prints them.

    Args:
        name: Name of the group.
        path: The file.
        setting: How it runs.
    """
    start = time.monotonic()

    def emit(row: Row) -> None:
        with open(path, "a", encoding="utf-8") as file:
            device = {"device": jax.devices()[0].device_kind, "jax_version": jax.__version__}
            file.write(json.dumps({"group": name} | row | device, default=float) + "\n")
        words = [f"{row['ms']:.3f} ms"] if "ms" in row else []
        words = [row["what"], row.get("program", ""), *words, row.get("result", "")]
        seconds = time.monotonic() - start
        print(f"[{name} {seconds:.0f} s]", "; ".join(filter(None, words)), flush=True)

    is_interpreted = setting.dry_run and CAN_INTERPRET
    try:
        with interpreted_kernels() if is_interpreted else contextlib.nullcontext():
            for row in GROUPS[name].run(setting):
                emit(row)
    except Exception as error:  # One line in the table; the traceback is for the terminal.
        traceback.print_exc()
        emit(failure_row(name, error))
        sys.exit(1)


if __name__ == "__main__":
    group_name, rows_path, limit, *others = sys.argv[1:]
    run_group(group_name, rows_path, Setting(float(limit), others == ["dry_run"]))
