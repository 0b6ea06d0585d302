"""Measures the overhead of the trainer over the compiled step.

    bazel run //xlstm/tools:benchmark_trainer -- --config.data.batch_size=28

Stretches of one real run alternate with a bare loop over the same compiled step and a fixed batch.
A stretch reads data, logs metrics to all loggers after every step, and writes one complete
checkpoint in its middle; it does not evaluate. Each stretch is compared with the mean of the bare
loops before and after it, which reduces the effect of a machine whose speed drifts.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from xlstm.common_types import TrainState
from xlstm.tools.command_line import print_table, run
from xlstm.tools.config import config_name, define_config_flags, run_config
from xlstm.trainer.base.trainer import Callback, fit
from xlstm.trainer.llm.callbacks import metrics_to_scalars
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.train import TrainingRun, open_training

_STRETCHES = flags.DEFINE_integer("stretches", 12, "Number of stretches of the run.", lower_bound=1)
_STEPS = 20  # Of a stretch, of a bare loop, and between checkpoints.


def measured_config(config: RunConfig, num_stretches: int) -> RunConfig:
    """Returns a configuration that logs every step, often saves, and does not evaluate."""
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, validation_fraction=0.0, validation_stores=()),
        trainer=dataclasses.replace(
            config.trainer,
            num_steps=num_stretches * _STEPS + _STEPS // 2,
            checkpoint_interval=_STEPS,
            keep_best_checkpoint=False,
        ),
        logger=dataclasses.replace(config.logger, interval=1),
    )


class _BareLoops(Callback):
    """A callback that ends a stretch half-way between checkpoints and times a bare loop."""

    def __init__(self, opened: TrainingRun, on_stretch: Callable[[], None]):
        self._opened, self._on_stretch = opened, on_stretch
        self._state = jax.tree.map(jnp.copy, opened.state)
        self._batch = next(opened.batches_from(0))
        self.bare, self.trained = [], []  # Seconds a step.

    def is_due(self, step: int) -> bool:
        return step % _STEPS == _STEPS // 2

    def on_step(self, step: int, state: TrainState) -> None:
        jax.block_until_ready(state)
        self._opened.checkpointer.wait_until_finished()
        if step > _STEPS:  # The first stretch includes compilation.
            self.trained.append((time.perf_counter() - self._begin) / _STEPS)
        begin = time.perf_counter()
        for _ in range(_STEPS):
            self._state, _ = self._opened.train_step(self._state, self._batch)
        jax.block_until_ready(self._state)
        self.bare.append((time.perf_counter() - begin) / _STEPS)
        self._on_stretch()
        self._begin = time.perf_counter()


def measure(opened: TrainingRun, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Times stretches of a run and bare loops.

    Args:
        opened: The run.
        num_steps: Its length.

    Returns:
        Seconds per step: the mean of the bare loops before and after each stretch, and each
        stretch, both of shape (number of stretches,).
    """
    columns = TextColumn("stretches"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("stretches", total=num_steps // _STEPS + 1)
        loops = _BareLoops(opened, lambda: progress.advance(task))
        fit(
            opened.state,
            opened.batches_from,
            opened.train_step,
            start_step=0,
            num_steps=num_steps,
            callbacks=[*opened.callbacks, loops],
            clock=opened.clock,
            to_scalars=metrics_to_scalars,
        )
    bare = np.array(loops.bare)
    return (bare[:-1] + bare[1:]) / 2, np.array(loops.trained)


def main(argv: list[str]) -> None:
    """Measures the overhead and prints a table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = measured_config(run_config(), _STRETCHES.value)
    with tempfile.TemporaryDirectory() as folder, open_training(config, folder) as opened:
        bare, trained = measure(opened, config.trainer.num_steps)
    table = Table(title=f"{config_name()} on {jax.devices()[0].device_kind}")
    for column in ("", "bare loop", "trainer", "overhead"):
        table.add_column(column, justify="right")
    overheads = trained / bare - 1
    for name, quantile in (("lower quartile", 0.25), ("median", 0.5), ("upper quartile", 0.75)):
        times = [f"{1e3 * np.quantile(seconds, quantile):.1f} ms" for seconds in (bare, trained)]
        table.add_row(name, *times, f"{np.quantile(overheads, quantile):.1%}")
    print_table(table)


if __name__ == "__main__":
    run(main, define_config_flags)
