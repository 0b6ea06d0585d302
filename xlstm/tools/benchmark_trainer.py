"""Measures what the trainer costs beside the compiled step.

    bazel run //xlstm/tools:benchmark_trainer -- --config.data.batch_size=10

Stretches of a real run (reading data, a row of metrics after every step into all loggers, a
checkpoint every 20 steps, written to the end within the stretch) take turns with a bare loop over
the same compiled step and a batch that is there. Evaluation is left out.
"""

import dataclasses
import tempfile
import time

import jax
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from xlstm.tools.command_line import run
from xlstm.tools.config import to_run_config
from xlstm.tools.config_flag import config_name, define_config_flag, with_config_paths
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.open_run import OpenRun, open_run

_CONFIG = define_config_flag()
_STRETCHES = flags.DEFINE_integer("stretches", 6, "Stretches of each kind.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 40, "Steps in a stretch.", lower_bound=1)
_CHECKPOINT_INTERVAL = 20


def _measured_config(config: RunConfig) -> RunConfig:
    """Logs every step, writes checkpoints often, and does not evaluate."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation_fraction=0.0, validation_stores=()),
        trainer=dataclasses.replace(
            config.trainer, checkpoint_interval=_CHECKPOINT_INTERVAL, keep_best_checkpoint=False
        ),
        logger=dataclasses.replace(config.logger, interval=1),
    )


def _time_stretches(opened: OpenRun, num_stretches: int, num_steps: int) -> tuple[list, list]:
    """Seconds a step of each stretch: of the bare loop, and of the trainer."""
    state, step = opened.state, 0
    bare, trained = [], []
    batch = next(opened.batches_from(0))
    # The first stretches compile, and are not counted.
    for _ in track(range(num_stretches + 1), "stretches", console=Console(stderr=True)):
        begin = time.perf_counter()
        for _ in range(num_steps):
            state, _ = opened.train_step(state, batch)
        jax.block_until_ready(state)
        bare.append((time.perf_counter() - begin) / num_steps)
        begin = time.perf_counter()
        state = opened.fit(state, step, step + num_steps)
        opened.checkpointer.wait()
        trained.append((time.perf_counter() - begin) / num_steps)
        step += num_steps
    return bare[1:], trained[1:]


def main(argv: list[str]) -> None:
    """Measures and prints."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = _measured_config(to_run_config(_CONFIG.value))
    with tempfile.TemporaryDirectory() as folder, open_run(config, folder) as opened:
        bare, trained = _time_stretches(opened, _STRETCHES.value, _STEPS.value)
    table = Table(title=f"{config_name()} on {jax.devices()[0].device_kind}")
    for column in ("", "bare loop", "trainer", "overhead"):
        table.add_column(column, justify="right")
    for name, choose in (("median", np.median), ("fastest", np.min)):
        one, other = choose(bare), choose(trained)
        table.add_row(
            name, f"{1e3 * one:.1f} ms", f"{1e3 * other:.1f} ms", f"{other / one - 1:.1%}"
        )
    Console().print(table)


if __name__ == "__main__":
    run(main, with_config_paths)
