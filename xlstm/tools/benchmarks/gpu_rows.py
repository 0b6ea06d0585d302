"""The rows of `benchmark_gpu`, and their table.

A row is a dictionary with these keys, of which only `group` and `what` are always there:

* `group`, `what`, `program`, `chunk_size`, `device`, `jax_version`: what was measured, and where;
* `ms`: the median time of a call; `min_ms`; `compile_s`; `memory_mib`, the temporary memory;
* `operations`, `bytes`: the work of a call, see `useful_operations` and `least_bytes`;
* `result`: more figures, as a text; `ok`: whether they are as they should be;
* `of_sheet`, `of_measured`: the least time for the work, over `ms`, see `with_fractions`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import MOSAIC_CHUNK_SIZE
from xlstm.tools.benchmarks.candidates import H100_RATES, Candidate, Shape
from xlstm.tools.benchmarks.timed import PASSES

Row = dict[str, Any]

_WIDEST_RESULT = 90


def failure_row(what: Any, error: Exception) -> Row:
    """Returns a row about something that failed, with the first two lines of the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' | '.join(lines[:2])}"
    return {"what": str(what), "ok": False, "result": f"FAILED {text[:300]}"}


def useful_operations(shape: Shape, name: str) -> int:
    """Returns the useful operations of one of `PASSES`, with the chunks that need the fewest."""
    return PASSES[name] * Candidate("", MOSAIC_CHUNK_SIZE, {}, len).forward_operations(shape)


def least_bytes(shape: Shape, name: str) -> int:
    """Returns the bytes that one of `PASSES` has to move, in bfloat16 with float32 gates.

    The forward pass reads `q, k, v, i, f` and writes `h`. The backward pass reads them and the
    cotangent of `h` again, and writes the gradients.
    """
    tokens = shape.batch * shape.num_heads * shape.time
    inputs = tokens * (2 * (2 * shape.qk_dim + shape.v_dim) + 4 * 2)
    h = tokens * 2 * shape.v_dim
    return inputs + h if name == "forward" else 3 * inputs + 2 * h


def with_fractions(rows: Sequence[Row]) -> list[Row]:
    """Adds the fractions of the least times, at the rates of the data sheet and measured rates.

    Args:
        rows: Rows of the groups; rows with `operations` alone and with `bytes` alone whose `what`
            is `product` and `copy` have the measured rates.

    Returns:
        The rows; those with times and work have `of_sheet`, and `of_measured` if both rates are
        known.
    """
    measured = {
        key: row[key] / row["ms"] * 1e3
        for row in rows
        for key, what in (("operations", "product"), ("bytes", "copy"))
        if row["what"] == what
    }
    rates = {"of_sheet": H100_RATES} | ({"of_measured": measured} if len(measured) == 2 else {})
    return [row | {name: _fraction(row, of) for name, of in rates.items()} for row in rows]


def _fraction(row: Row, rates: Mapping[str, float]) -> float | None:
    if "ms" not in row:
        return None
    return max(row.get(key, 0) / rate for key, rate in rates.items()) / row["ms"] * 1e3


def rows_table(rows: Sequence[Row]) -> Table:
    """Returns a table of rows that `with_fractions` completed."""
    names = {f"{row['device']}, jax {row['jax_version']}" for row in rows if "device" in row}
    table = Table(
        title="; ".join(sorted(names)), box=box.SIMPLE_HEAD, padding=0, collapse_padding=True
    )
    for name in ("group", "what", "program"):
        table.add_column(name, overflow="fold")
    for name in ("chunk", "ms", "TFLOP/s", "GB/s", "of\nsheet", "of\nmeasured", "memory\nMiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result", overflow="fold", max_width=_WIDEST_RESULT)

    def number(row: Row, value: Any, form: str) -> str:
        return format(value, form) if "ms" in row and value else ""

    for row in rows:
        ms = row.get("ms", 1.0)
        marks = {True: "ok: ", False: "NOT OK: "}
        table.add_row(
            row["group"],
            row["what"],
            row.get("program", ""),
            str(row.get("chunk_size") or ""),
            number(row, row.get("ms"), ",.3f"),
            number(row, row.get("operations", 0) / ms / 1e9, ",.1f"),
            number(row, row.get("bytes", 0) / ms / 1e6, ",.0f"),
            number(row, row.get("of_sheet"), ".0%"),
            number(row, row.get("of_measured"), ".0%"),
            number(row, row.get("memory_mib"), ",.0f"),
            marks.get(row.get("ok"), "") + row.get("result", ""),
        )
    return table
