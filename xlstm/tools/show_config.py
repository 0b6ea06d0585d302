"""Prints every field of a config: its value, its default and its meaning.

    bazel run //xlstm/tools:show_config -- --config=smoke

Each field can be set by a flag, such as `--config.model.embedding_dim=256`. On a terminal, values
that are not the default are bold. Piped, each field is one line.
"""

import dataclasses
import io
from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xlstm.tools.command_line import run
from xlstm.tools.config import (
    config_name,
    define_config_flags,
    field_comments,
    run_config,
)
from xlstm.trainer.llm.config import RunConfig, sections

_WIDTH_OF_TABLE = 130  # Narrower terminals get the meaning below each field.
_ANY_WIDTH = 10_000


class FieldRow(NamedTuple):
    """A field of a configuration, as text."""

    field: str
    value: str
    default: str
    meaning: str


def field_rows(config: RunConfig) -> Iterator[FieldRow]:
    """Yields the fields of a configuration, section by section."""
    defaults = RunConfig()
    for section, section_class in sections().items():
        comments = field_comments(section_class)
        for field in dataclasses.fields(section_class):
            value, default = (
                getattr(getattr(values, section), field.name) for values in (config, defaults)
            )
            name = f"{section}.{field.name}"
            yield FieldRow(name, _text(value), _text(default), comments[field.name])


def _text(value: object) -> str:
    return str(value) if value != "" else '""'


def print_fields(console: Console, title: str, rows: Iterator[FieldRow]) -> None:
    """Prints the fields of a configuration.

    Args:
        console: Where to print. Unless it is a terminal, each field is one line of any width.
        title: The first line.
        rows: Result of `field_rows`.
    """
    console.print(title)
    if console.is_terminal and console.width < _WIDTH_OF_TABLE:
        for row in rows:
            console.print(Text(f"{row.field} = {row.value}", _style(row)), end="")
            console.print("" if row.value == row.default else f"  (default {row.default})")
            console.print(Padding(row.meaning, (0, 0, 0, 4)))
        return
    table = Table(box=None, pad_edge=False)
    for column in FieldRow._fields:
        table.add_column(column, no_wrap=not console.is_terminal, overflow="fold")
    for row in rows:
        table.add_row(*row, style=_style(row))
    if console.is_terminal:
        console.print(table)
        return
    whole = Console(file=io.StringIO(), width=_ANY_WIDTH, markup=False, highlight=False)
    whole.print(table)
    for line in whole.file.getvalue().splitlines():
        console.print(line.rstrip(), soft_wrap=True)


def _style(row: FieldRow) -> str:
    return "" if row.value == row.default else "bold"


def main(argv: list[str]) -> None:
    """Prints the config that the flags choose."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    rows = field_rows(run_config())
    print_fields(Console(markup=False, highlight=False), config_name(), rows)


if __name__ == "__main__":
    run(main, define_config_flags)
