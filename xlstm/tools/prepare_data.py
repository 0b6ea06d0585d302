"""Makes a token store out of text files.

    bazel run //xlstm/tools:prepare_data -- --input=books,more.jsonl.gz --output=store

Reads `.jsonl` and `.jsonl.gz` (a line is a document), `.parquet` (a row is a document) and any
other file as UTF-8 text (a file is a document). The store depends on the input only, not on the
number of workers; if anything goes wrong, there is none. Killed, the tool may leave a folder
`<output>.incomplete-...` behind, which may be deleted.
"""

import glob
import os
import shlex
from collections.abc import Iterable, Sequence

from absl import flags
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from xlstm.dataset.config import DataConfig
from xlstm.dataset.document_readers import read_blocks
from xlstm.dataset.parallel_encoding import encode_blocks
from xlstm.dataset.token_store import StoreMeta, TokenStore
from xlstm.dataset.token_store_writer import TokenStoreWriter
from xlstm.dataset.tokenizer import Tokenizer, load_tokenizer
from xlstm.tools.command_line import resolve_path, run

_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "Files, folders (everything in them but hidden files) or glob patterns, separated by commas; "
    "may be repeated. A file that is named twice is read once.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "The folder of the new token store; it must not exist.", required=True
)
_TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "'byte', or the path of a tokenizer.json.")
_EOD_TOKEN = flags.DEFINE_string(
    "eod_token", None, "The tokenizer's end-of-document token, where it is none of the usual ones."
)
_TEXT_COLUMN = flags.DEFINE_string(
    "text_column", "text", "The key (JSONL) or column (Parquet) that holds the text."
)
_WORKERS = flags.DEFINE_integer(
    "workers", os.cpu_count() or 1, "Processes that parse and tokenise.", lower_bound=1
)


def find_files(inputs: Iterable[str]) -> list[str]:
    """Lists the files that the inputs stand for.

    Args:
        inputs: Absolute paths of files and folders, or glob patterns (`**` is any folders).

    Returns:
        Their absolute paths, in the order of the inputs, each input's own sorted, without doubles.

    Raises:
        ValueError: An input stands for no file.
    """
    files: dict[str, None] = {}
    for pattern in inputs:
        paths = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        found = [file for path in sorted(paths) for file in _files_below(path)]
        if not found:
            raise ValueError(f"--input={pattern}: there is no such file, or none in that folder")
        files.update(dict.fromkeys(found))
    return list(files)


def prepare(
    files: Sequence[str], output: str, tokenizer: Tokenizer, text_column: str, workers: int
) -> tuple[TokenStore, int]:
    """Writes a token store, with a progress bar on the terminal.

    Args:
        files: What to read, in this order.
        output: The folder to make.
        tokenizer: What `load_tokenizer` returned.
        text_column: The key or column with the text.
        workers: The number of processes.

    Returns:
        The store, and the number of documents left out since they had no text.

    Raises:
        ValueError: The input is malformed or has no text, or the output exists.
        OSError: A file cannot be read or written.
    """
    num_empty = 0
    total = sum(os.path.getsize(file) for file in files)
    with TokenStoreWriter(output, tokenizer) as writer, _progress_bar() as progress:
        task = progress.add_task(f"{len(files)} files", total=total)
        blocks = read_blocks(files, text_column)
        for block, documents in encode_blocks(blocks, tokenizer, workers):
            writer.add(documents)
            num_empty += documents.num_empty
            progress.advance(task, block.input_bytes)
    return TokenStore.open(output), num_empty


def train_command(path: str, meta: StoreMeta) -> str:
    """Returns the command that trains on a store."""
    # A path with a comma or a space would be taken for several.
    value = path if not set(path) & set(", ") else repr(path)
    arguments = [f"--config.data.stores={value}"]
    if meta.tokenizer != "byte":
        arguments.append(f"--config.model.vocab_size={meta.vocab_size}")
    if not round(meta.num_documents * DataConfig.validation_fraction):  # Not one document.
        fraction = 0.0 if meta.num_documents == 1 else round(1 / meta.num_documents, 2)
        arguments.append(f"--config.data.validation_fraction={fraction}")
    return shlex.join(["bazel", "run", "//xlstm/tools:train", "--", *arguments])


def main(argv: Sequence[str]) -> None:
    """Runs the tool.

    Args:
        argv: The arguments that are no flags, of which there must be none but the program's name.

    Raises:
        ValueError: Bad flags or bad input.
        OSError: A file cannot be read or written.
    """
    if len(argv) > 1:
        raise ValueError(f"what is {argv[1]!r}? Every argument is a flag: see --help")
    patterns = [part for value in _INPUT.value for part in value.split(",") if part]
    files = find_files(resolve_path(pattern) for pattern in patterns)
    name = _TOKENIZER.value
    tokenizer = load_tokenizer(name if name == "byte" else resolve_path(name), _EOD_TOKEN.value)
    output = resolve_path(_OUTPUT.value)
    store, num_empty = prepare(files, output, tokenizer, _TEXT_COLUMN.value, _WORKERS.value)
    _report(store, num_empty)


def _files_below(path: str) -> list[str]:
    """Returns the file itself, or the files in a folder, sorted; hidden ones are left out."""
    if os.path.isfile(path):
        return [path]
    files = []
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report(store: TokenStore, num_empty: int) -> None:
    """Prints what was made, and how to use it."""
    meta = store.meta
    table = Table.grid(padding=(0, 2))
    rows = {
        "documents": f"{meta.num_documents:,}",
        "left out (empty)": f"{num_empty:,}",
        "tokens": f"{meta.num_tokens:,}",
        "bytes of text": f"{meta.text_bytes:,}",
        "tokens per byte": f"{meta.num_tokens / meta.text_bytes:.3f}",
        "vocabulary": f"{meta.vocab_size:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
    print(f"\nThe token store is {store.path}. Train on it:\n  {train_command(store.path, meta)}")


if __name__ == "__main__":
    run(main)
