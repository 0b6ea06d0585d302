"""Prints every field of a config: its value, its default and what it means."""

import dataclasses

from rich.console import Console
from rich.table import Table

from xlstm.tools.command_line import run
from xlstm.tools.config import (
    config_name,
    define_config_flags,
    field_comments,
    run_config,
)
from xlstm.trainer.llm.config import RunConfig, sections


def config_table(config: RunConfig, title: str) -> Table:
    """Lists the fields of a configuration; values that are not the default are bold."""
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("field", no_wrap=True)
    for column in ("value", "default", "meaning"):
        table.add_column(column, overflow="fold")
    defaults = RunConfig()
    for section, section_class in sections().items():
        comments = field_comments(section_class)
        for field in dataclasses.fields(section_class):
            value = getattr(getattr(config, section), field.name)
            default = getattr(getattr(defaults, section), field.name)
            style = "bold" if value != default else None
            row = (f"{section}.{field.name}", str(value), str(default), comments[field.name])
            table.add_row(*row, style=style)
        table.add_section()
    return table


def main(argv: list[str]) -> None:
    """Prints the config that the flags choose."""
    if argv[1:]:
        raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
    config = run_config()
    Console(markup=False, highlight=False).print(config_table(config, config_name()))


if __name__ == "__main__":
    run(main, define_config_flags)
