"""Makes a token store from text files.

    bazel run //xlstm/tools:prepare_data -- --input=books,more.jsonl.gz --output=store

It reads JSON lines (`.jsonl`, `.ndjson`, `.jsonlines`, `.json`; each line is a document), `.json`
with an array of objects, Parquet (`.parquet`; each row is a document) and any other file as UTF-8
text (each file is a document). All but Parquet may be compressed: `.gz`, `.zst`, `.bz2`, `.xz`. The
store depends on the input only, not on the number of workers. If the tool fails, it writes no
store. If it is killed, it may leave a folder `<output>.incomplete-...`, which you can delete.
"""

import dataclasses
import os
import shlex
from collections.abc import Sequence

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

from xlstm.dataset.base_tokenizer import list_characters
from xlstm.dataset.config import DataConfig
from xlstm.dataset.document_block import DocumentBlock
from xlstm.dataset.document_readers import read_blocks
from xlstm.dataset.input_files import find_files
from xlstm.dataset.store_meta import StoreMeta
from xlstm.dataset.token_store import TokenStore
from xlstm.dataset.token_store_writer import EncodedDocuments, TokenStoreWriter, encode_blocks
from xlstm.dataset.tokenizer import Tokenizer, load_tokenizer
from xlstm.installation import tool_command
from xlstm.tools.command_line import define_share, print_line, print_table, resolve_path, run
from xlstm.visible_text import visible

_INPUT = flags.DEFINE_multi_string(
    "input",
    None,
    "Files, folders (everything in them but hidden files) or glob patterns to read, separated by "
    "commas. The flag can be repeated: give a path with a comma in a flag of its own, and write ? "
    "for a comma in a pattern. Links are followed, and a file with several names is read once.",
    required=True,
)
_OUTPUT = flags.DEFINE_string(
    "output", None, "Folder of the new token store. It must not exist yet.", required=True
)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "byte", "'byte', or the path of a tokenizer.json or of a folder that holds one."
)
_EOD_TOKEN = flags.DEFINE_string(
    "eod_token",
    None,
    "The token after each document. By default it is the one that the files next to the tokenizer "
    "name, or else a common one.",
)
_BOS_TOKEN = flags.DEFINE_string(
    "bos_token",
    None,
    "The token before each document. By default it is the one that the tokenizer puts there, or "
    "that the files next to it name, or else --eod_token, which then separates documents.",
)
_MAX_UNKNOWN = define_share(
    "max_unknown",
    0.0,
    "The largest share of all characters that may be dropped because the tokenizer has no token "
    "for them, not even an unknown token. If more are dropped, the tool fails.",
)
_TEXT_COLUMN = flags.DEFINE_string(
    "text_column",
    "text",
    "The key (JSON) or column (Parquet) that holds the text. 'data.text' means the key 'text' in "
    "'data', unless there is a key named 'data.text'.",
)
_SKIP_BAD_RECORDS = flags.DEFINE_bool(
    "skip_bad_records",
    False,
    "Skips records that are malformed or have no text, and files that are not UTF-8 text, and "
    "lists the first ten at the end. By default the first one stops the tool. A damaged file "
    "(truncated, or with a wrong checksum) always stops it.",
)
_MAX_BAD_RECORDS = define_share(
    "max_bad_records",
    0.01,
    "The largest share of all records that --skip_bad_records may skip. If more are bad, the tool "
    "fails.",
)
_WORKERS = flags.DEFINE_integer(
    "workers",
    os.cpu_count() or 1,
    "Number of threads that tokenize.",
    lower_bound=1,
)


@dataclasses.dataclass
class LeftOut:
    """Counts of input that is not in a store.

    Attributes:
        num_empty: Number of documents without text.
        num_bad: Number of malformed records.
        first_bad: Messages about the first ten malformed records.
        num_unknown: Number of unknown tokens, which are in the store but carry no text.
        num_characters: Number of characters without a token.
        first_characters: Messages about the first ten documents with such characters.
    """

    num_empty: int = 0
    num_bad: int = 0
    first_bad: list[str] = dataclasses.field(default_factory=list)
    num_unknown: int = 0
    num_characters: int = 0
    first_characters: list[str] = dataclasses.field(default_factory=list)

    def add(self, documents: EncodedDocuments, block: DocumentBlock) -> None:
        """Counts what was left out when a block's documents were encoded."""
        self.num_empty += documents.num_empty
        self.num_bad += len(documents.bad_records)
        self.first_bad += documents.bad_records[: 10 - len(self.first_bad)]
        self.num_unknown += documents.num_unknown
        for index, characters in documents.dropped.items():
            self.num_characters += len(characters)
            if len(self.first_characters) < 10:
                message = f"{block.location(index)}: no token for {list_characters(characters)}"
                self.first_characters.append(message)


def prepare(
    files: Sequence[str],
    output: str,
    tokenizer: Tokenizer,
    text_column: str,
    workers: int,
    max_bad_records: float | None = None,
    max_unknown: float = 0.0,
) -> tuple[TokenStore, LeftOut]:
    """Writes a token store, with a progress bar on the terminal.

    Args:
        files: Files to read, in this order.
        output: Folder to create.
        tokenizer: Result of `load_tokenizer`.
        text_column: The key or column with the text.
        workers: Number of threads that tokenize.
        max_bad_records: Share of malformed records that may be skipped; None if the first one is an
            error.
        max_unknown: Share of characters that may be dropped because they have no token.

    Returns:
        The store, and what was left out.

    Raises:
        ValueError: If the input is malformed or has no text, or the output exists.
        OSError: If a file cannot be read or written.
    """
    left_out = LeftOut()
    num_documents = num_characters = 0
    skip_bad_records = max_bad_records is not None
    total = sum(os.path.getsize(file) for file in files)
    with TokenStoreWriter(output, tokenizer) as writer:
        with _progress_bar() as progress:
            task = progress.add_task(f"{len(files)} files", total=total)
            blocks = read_blocks(files, text_column)
            for block, documents in encode_blocks(blocks, tokenizer, workers, skip_bad_records):
                writer.add(documents)
                left_out.add(documents, block)
                if left_out.num_characters and not max_unknown:
                    _report_characters(left_out, documents.num_characters, tokenizer, max_unknown)
                num_documents += documents.lengths.size
                num_characters += documents.num_characters
                progress.advance(task, block.input_bytes)
        if left_out.num_bad:
            _report_bad_records(left_out, num_documents, max_bad_records)
        if left_out.num_characters:
            _report_characters(left_out, num_characters, tokenizer, max_unknown)
    return TokenStore.open(output), left_out


def train_command(path: str, meta: StoreMeta) -> str:
    """Returns the command that trains on a store, to be pasted into a shell.

    Args:
        path: The store's folder.
        meta: Its metadata.
    """
    # Without quotes, a path with a comma or a space would be read as several.
    value = path if not set(path) & set(", ") else repr(path)
    # The default folder of a run may hold another run already.
    workdir = os.path.join("runs", os.path.basename(path))
    arguments = [f"--workdir={workdir}", f"--config.data.stores={value}"]
    if meta.tokenizer != "byte":
        arguments.append(f"--config.model.vocab_size={meta.vocab_size}")
    if not round(meta.num_documents * DataConfig.validation_fraction):  # Less than one document.
        fraction = 0.0 if meta.num_documents == 1 else round(1 / meta.num_documents, 2)
        arguments.append(f"--config.data.validation_fraction={fraction}")
    return f"{tool_command('train')} {shlex.join(arguments)}"


def main(argv: Sequence[str]) -> None:
    """Makes the store that the flags describe."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}: expected flags only, see --help")
    if _MAX_BAD_RECORDS.present and not _SKIP_BAD_RECORDS.value:
        raise ValueError("--max_bad_records needs --skip_bad_records")
    files = find_files(path for value in _INPUT.value for path in _split_inputs(value))
    name = _TOKENIZER.value
    path = name if name == "byte" else resolve_path(name)
    tokenizer = load_tokenizer(path, _EOD_TOKEN.value, _BOS_TOKEN.value)
    output = resolve_path(_OUTPUT.value)
    store, left_out = prepare(
        files,
        output,
        tokenizer,
        _TEXT_COLUMN.value,
        _WORKERS.value,
        _MAX_BAD_RECORDS.value if _SKIP_BAD_RECORDS.value else None,
        _MAX_UNKNOWN.value,
    )
    _report(store, left_out)


def _split_inputs(value: str) -> list[str]:
    """Returns the paths and patterns of an --input, which commas separate or are part of."""
    if value and os.path.lexists(resolve_path(value)):
        return [resolve_path(value)]
    return [resolve_path(part) for part in value.split(",") if part]


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _report_bad_records(left_out: LeftOut, num_documents: int, max_share: float) -> None:
    """Lists the first bad records, and raises ValueError if there are too many."""
    for message in left_out.first_bad:
        print_line(f"left out: {message}")
    if left_out.num_bad > len(left_out.first_bad):
        print_line(f"left out: {left_out.num_bad - len(left_out.first_bad):,} more")
    num_records = num_documents + left_out.num_empty + left_out.num_bad
    if left_out.num_bad > max_share * num_records:
        raise ValueError(
            f"{left_out.num_bad:,} of {num_records:,} records are bad "
            f"({left_out.num_bad / num_records:.2%}), more than --max_bad_records={max_share}"
        )


def _report_characters(
    left_out: LeftOut, num_characters: int, tokenizer: Tokenizer, max_share: float
) -> None:
    """Lists the first characters without a token, and raises ValueError if there are too many."""
    share = left_out.num_characters / num_characters
    if share > max_share:
        example = left_out.first_characters[0]
        seen = "" if max_share else " so far"
        raise ValueError(
            f"{example} in the tokenizer {tokenizer.name}, which leaves out"
            f" {left_out.num_characters:,} of {num_characters:,} characters{seen} ({share:.2%}),"
            f" more than --max_unknown={max_share:g}: use a tokenizer that has tokens for them, or"
            " raise --max_unknown"
        )
    for message in left_out.first_characters:
        print_line(f"left out: {message}")


def _report(store: TokenStore, left_out: LeftOut) -> None:
    """Prints a summary of the store, and the command that trains on it."""
    meta = store.meta
    table = Table.grid(padding=(0, 2))
    rows = {
        "documents": f"{meta.num_documents:,}",
        "left out (empty)": f"{left_out.num_empty:,}",
        "left out (bad)": f"{left_out.num_bad:,}",
        "left out (chars)": f"{left_out.num_characters:,}",
        "unknown tokens": f"{left_out.num_unknown:,}",
        "tokens": f"{meta.num_tokens:,}",
        "bytes of text": f"{meta.text_bytes:,}",
        "tokens per byte": f"{meta.num_tokens / meta.text_bytes:.3f}",
        "vocabulary": f"{meta.vocab_size:,}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    print_table(table)
    command = train_command(store.path, meta)
    print(f"\nThe token store is {visible(store.path)}. To train on it, run in the checkout:\n")
    print(f"  {visible(command)}")


if __name__ == "__main__":
    run(main)
