"""Evaluates a run's parameters on its validation sets or on other token stores.

    bazel run //xlstm/tools:evaluate -- --checkpoint=runs/mine
    bazel run //xlstm/tools:evaluate -- --checkpoint=runs/mine/checkpoints/5000 \
        --data=wiki=data/wiki,books=data/books --mesh=fsdp=8

The run may be training meanwhile; its folder is not changed. If it keeps a moving average of the
parameters, the average is evaluated.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from typing import Any

from absl import flags
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from xlstm.tools.command_line import (
    announce_start,
    define_verify_data,
    output_path,
    print_table,
    resolve_path,
    run,
)

if __name__ == "__main__":  # The other imports take seconds.
    announce_start("evaluate: loading JAX and the model code ...")

import jax

from xlstm.dataset.data import open_data
from xlstm.dataset.store_guard import StoreGuard
from xlstm.dataset.validation import ValidationSet, open_validation_sets, stores_of
from xlstm.files import write_atomically
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.tools.checkpoint_flags import checkpoint_path, note_nonfinite, use_checkpoint
from xlstm.tools.processes import abort_all_on_failure, initialize_devices
from xlstm.trainer.base.multihost import sync_processes
from xlstm.trainer.checkpoints.read_params import read_params, read_run_info
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import check_vocabulary, create_run_mesh
from xlstm.trainer.llm.evaluation import PositionLoss, create_evaluation
from xlstm.trainer.llm.find_checkpoint import split_checkpoint_path
from xlstm.trainer.llm.language_model import abstract_params
from xlstm.trainer.llm.run_tokenizer import check_tokenizer
from xlstm.trainer.llm.workdir import Workdir
from xlstm.trainer.logger.base_logger import validation_suffixes
from xlstm.trainer.logger.terminal import format_accuracy
from xlstm.visible_text import visible

_DATA = flags.DEFINE_list(
    "data",
    None,
    "Token stores, as name=path or path. The default is the run's validation sets.",
)
_LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Ranges of lengths of the run's task, such as 41-64,65-256. The default is the run's ranges.",
)
_MAX_BATCHES = flags.DEFINE_integer(
    "max_batches",
    None,
    "Largest number of batches of each set. The default is all batches.",
    lower_bound=1,
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Rows in a batch. The default is the run's batch size.", lower_bound=1
)
_CONTEXT_LENGTH = flags.DEFINE_integer(
    "context_length",
    None,
    "Tokens in a row. The default is the run's context length.",
    lower_bound=1,
)
_CARRY_STATE = flags.DEFINE_boolean(
    "carry_state",
    None,
    "Whether rows read whole documents, of any length, and carry their state from batch to batch."
    " This also prints the loss by position in the document. The default is data.carry_state of the"
    " run.",
)
_VERIFY_DATA = define_verify_data()
_JSON = flags.DEFINE_string("json", None, "File to write the results to, as a JSON object.")
_MAX_PADDED_TOKENS = 2**24


def _changed(config: RunConfig) -> RunConfig:
    """Returns the run's configuration, changed as the flags say."""
    data = config.data
    if _DATA.value is not None and data.task:
        raise ValueError(f"the run is on data.task={data.task!r}: give --lengths, not --data")
    if _CARRY_STATE.value and data.task:
        raise ValueError(
            "--carry_state reads the documents of stores, but the run is on"
            f" data.task={data.task!r}"
        )
    if _LENGTHS.value is not None and not data.task:
        raise ValueError("--lengths is for runs on a task: give --data")
    if _LENGTHS.value is not None:
        data = dataclasses.replace(data, validation_lengths=tuple(_LENGTHS.value))
    if _DATA.value is not None:
        named = [_named_store(entry) for entry in _DATA.value]
        data = dataclasses.replace(data, validation_fraction=0.0, validation_stores=tuple(named))
    data = dataclasses.replace(
        data,
        ramp_batch_sizes=(),
        ramp_steps=(),
        batch_size=_BATCH_SIZE.value or data.batch_size,
        context_length=_CONTEXT_LENGTH.value or data.context_length,
    )
    if _CARRY_STATE.value is not None:
        shuffle = "contiguous" if _CARRY_STATE.value else data.shuffle
        # The weights of stores concern training alone.
        data = dataclasses.replace(
            data, carry_state=_CARRY_STATE.value, shuffle=shuffle, weights=()
        )
    trainer = dataclasses.replace(config.trainer, num_minibatches=1)
    return dataclasses.replace(config, data=data, trainer=trainer)


def _named_store(entry: str) -> str:
    name, equals, path = entry.partition("=")
    if not equals:
        name, path = os.path.basename(os.path.normpath(entry)), entry
    return f"{name}={resolve_path(path)}"


def _open_sets(config: RunConfig, workdir: Workdir, step: int) -> list[ValidationSet]:
    if config.data.task or config.data.validation_fraction > 0:
        sets = open_data(config.data, workdir.stdlib_store).validation_sets()
    else:
        sets = open_validation_sets(config.data, [])
    if not sets:
        raise ValueError(
            "the run has no validation sets: name token stores by --data, or --lengths"
        )
    # All sets have the same tokenizer.
    tokenizer = sets[0].tokenizer
    check_tokenizer(workdir, read_run_info(workdir.checkpoints, step), tokenizer)
    check_vocabulary(config, tokenizer)
    _check_batch_size(config, sets)
    return sets


def _check_batch_size(config: RunConfig, sets: list[ValidationSet]) -> None:
    """Raises ValueError if a batch is large and would consist mostly of padding."""
    data, held = config.data, sum(store.meta.num_tokens for store in stores_of(sets))
    if data.batch_size * data.context_length > max(held, _MAX_PADDED_TOKENS):
        raise ValueError(
            f"a batch of {data.batch_size:,} rows of {data.context_length:,} tokens is larger than"
            " the validation sets: give a smaller --batch_size or --context_length"
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of an evaluation.

    Attributes:
        row: The step, and the results of `create_evaluation`.
        positions: Losses by position in the document, by the name of the validation set.
    """

    row: dict[str, float]
    positions: dict[str, list[PositionLoss]]

    def to_dict(self) -> dict[str, Any]:
        """Returns the result as a JSON object."""
        positions = {
            f"loss_by_position{name and '_'}{name}": [dataclasses.asdict(loss) for loss in losses]
            for name, losses in self.positions.items()
        }
        return self.row | positions


def load_checkpoint(config: RunConfig, workdir: Workdir, step: int) -> Callable[[], Result]:
    """Loads a checkpoint and opens the validation sets.

    Args:
        config: The run's configuration.
        workdir: The run's folder.
        step: The checkpoint's step.

    Returns:
        A function that evaluates the checkpoint as the flags say, and no longer needs its folder.
    """
    config = _changed(config)
    mesh, sets = create_run_mesh(config), _open_sets(config, workdir, step)
    like, specs = abstract_params(config, mesh)
    params = read_params(workdir.checkpoints, step, like)
    note_nonfinite(params)

    def evaluate() -> Result:
        columns = TextColumn("batches"), MofNCompleteColumn(), TimeElapsedColumn()
        console = Console(stderr=True, quiet=jax.process_index() != 0)
        say = functools.partial(console.print, markup=False, soft_wrap=True)
        guard = StoreGuard(stores_of(sets), say)
        guard.verify_first(_VERIFY_DATA.value)
        sync_processes("stores")
        progress = Progress(*columns, console=console, disable=not console.is_terminal)
        with guard, progress:
            task, positions = progress.add_task("batches", total=None), {}
            evaluate_params = create_evaluation(
                mesh,
                specs,
                xLSTMLMModel(config.language_model).apply,
                sets,
                _MAX_BATCHES.value,
                on_batch=lambda: progress.advance(task),
                carried_state=CarriedState.of_run(config),
                report_positions=positions.__setitem__,
            )
            return Result({"step": step} | evaluate_params(params), positions)

    return evaluate


def _table(row: dict[str, float]) -> Table:
    table = Table()
    for column in ("set", "loss (nats/token)", "perplexity", "accuracy", "bits/byte"):
        table.add_column(column, justify="left" if column == "set" else "right")
    for suffix in validation_suffixes(row):
        bits = row.get(f"val_bits_per_byte{suffix}")
        table.add_row(
            visible(suffix.removeprefix("_")) or "held out",
            f"{row['val_loss' + suffix]:.4f}",
            f"{row['val_perplexity' + suffix]:,.2f}",
            format_accuracy(row["val_accuracy" + suffix]),
            f"{bits:.4f}" if bits is not None else "",
        )
    return table


def _positions_table(name: str, losses: list[PositionLoss]) -> Table:
    table = Table(title=f"{visible(name) or 'held out'}: loss by position in the document")
    for column in ("positions", "targets", "loss (nats/token)"):
        table.add_column(column, justify="right")
    for loss in losses:
        positions = f"{loss.first:,} to {loss.last:,}"
        table.add_row(positions, f"{loss.count:,}", f"{loss.loss:.4f}")
    return table


def _extent() -> str:
    """Returns how much of each validation set is evaluated, in words."""
    if _MAX_BATCHES.value is None:
        return "complete validation sets"
    return f"at most {_MAX_BATCHES.value:,} batches of each validation set"


def main(argv: list[str]) -> None:
    """Evaluates as the flags say, and prints a table."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    path = checkpoint_path()
    json_path = output_path("json", _JSON.value)
    initialize_devices()
    with abort_all_on_failure():
        result = use_checkpoint(path, load_checkpoint)()
        if jax.process_index() == 0:
            if json_path:
                write_atomically(json_path, json.dumps(result.to_dict(), indent=2) + "\n")
            workdir, _ = split_checkpoint_path(path)
            print(f"step {result.row['step']:,} of {visible(workdir.path)}, {_extent()}:")
            print_table(_table(result.row))
            for name, losses in result.positions.items():
                print_table(_positions_table(name, losses))


if __name__ == "__main__":
    run(main)
