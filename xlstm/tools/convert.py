"""Converts checkpoints from and to the Hugging Face format (`xLSTMForCausalLM`).

    bazel run //xlstm/tools:convert -- --from_hf=models/xlstm-7b --to=runs/xlstm-7b
    bazel run //xlstm/tools:convert -- --from=runs/mine --to_hf=models/mine

The first command imports a model as a run folder at step 0: evaluate it, generate with it, or
fine-tune it with `--config=finetune:runs/xlstm-7b`. The second exports a run's last checkpoint, or
the checkpoint that `--from` names; if the run keeps a moving average of the parameters, the average
is exported. Both copy the tokenizer, and hold only a few tensors or one file in memory.
"""

import contextlib
import re
from collections.abc import Callable, Iterator

import jax
from absl import flags
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from xlstm.common_types import DTYPES
from xlstm.huggingface.convert import ConversionSummary, export_model, import_model
from xlstm.tools.command_line import print_note, resolve_path, run
from xlstm.trainer.llm.find_checkpoint import read_checkpoint
from xlstm.trainer.llm.workdir import Workdir, load_run_config
from xlstm.visible_text import visible

_FROM_HF = flags.DEFINE_string(
    "from_hf", None, "Folder of a model in the Hugging Face format to import."
)
_TO = flags.DEFINE_string("to", None, "Run folder to create from the imported model.")
_FROM = flags.DEFINE_string(
    "from", None, "Folder of a run, to export its last checkpoint, or of one of its checkpoints."
)
_TO_HF = flags.DEFINE_string(
    "to_hf", None, "Folder to create for the exported model in the Hugging Face format."
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Type of the exported tensors.")
_MAX_SHARD_SIZE = flags.DEFINE_string(
    "max_shard_size", "5GB", "Largest size of an exported file, in MB, GB, MiB or GiB."
)
_EOD_TOKEN = flags.DEFINE_string(
    "eod_token",
    None,
    "Token that ends the documents of the imported model [the one that the model's files name].",
)
_REFUSE_NONFINITE = flags.DEFINE_bool(
    "refuse_nonfinite",
    False,
    "Fail if a parameter is infinite or NaN, instead of printing a note.",
)
_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def _to_bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)(MB|GB|MiB|GiB)", size)
    if not match or int(match[1]) < 1:
        raise ValueError(f"--max_shard_size={size}: expected a size such as 5GB or 500MB")
    return int(match[1]) * _UNITS[match[2]]


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Shows a progress bar on a terminal; yields the function that updates it."""
    columns = TextColumn("parameters"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("parameters", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def convert() -> tuple[ConversionSummary, str]:
    """Converts as the flags say; returns a summary and the folder that was written."""
    chosen = {flag.name for flag in (_FROM_HF, _TO, _FROM, _TO_HF) if flag.value}
    if chosen == {"from_hf", "to"}:
        if _DTYPE.present or _MAX_SHARD_SIZE.present:
            raise ValueError("--dtype and --max_shard_size apply to --to_hf: imports are float32")
        source, target = resolve_path(_FROM_HF.value), resolve_path(_TO.value)
        options = {"eod_token": _EOD_TOKEN.value, "refuse_nonfinite": _REFUSE_NONFINITE.value}
        with _progress() as report:
            return import_model(source, target, report, **options), target
    if _EOD_TOKEN.value is not None:
        raise ValueError("--eod_token applies to --from_hf: a run has its own")
    if chosen == {"from", "to_hf"}:
        max_shard_bytes = _to_bytes(_MAX_SHARD_SIZE.value)
        source, target = resolve_path(_FROM.value), resolve_path(_TO_HF.value)
        options = {
            "dtype": _DTYPE.value,
            "max_shard_bytes": max_shard_bytes,
            "refuse_nonfinite": _REFUSE_NONFINITE.value,
        }

        def export(workdir: Workdir, step: int) -> ConversionSummary:
            config = load_run_config(workdir)
            with _progress() as report:
                return export_model(config, workdir, step, target, report, **options)

        return read_checkpoint(source, export, print_note), target
    raise ValueError("expected two folders: --from_hf and --to, or --from and --to_hf")


def main(argv: list[str]) -> None:
    """Converts as the flags say, and prints a summary."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    jax.config.update("jax_platforms", "cpu")  # An accelerator would not help, and may be busy.
    summary, target = convert()
    for note in summary.notes:
        print_note(note)
    count = summary.num_files
    files = f" in {count} file{'s' if count > 1 else ''}" if count else ""
    Console(highlight=False, soft_wrap=True, emoji=False).print(
        f"wrote {summary.num_parameters:,} parameters ({decimal(summary.num_bytes)}{files}) to"
        f" {visible(target)}",
        markup=False,
    )


if __name__ == "__main__":
    run(main)
