import io

import pytest
from rich.console import Console

from xlstm.tools.benchmarks.candidates import Shape
from xlstm.tools.benchmarks.gpu_rows import (
    failure_row,
    least_bytes,
    rows_table,
    useful_operations,
    with_fractions,
)

SHAPE = Shape(2, 3, 100, 4, 6)


def test_work():
    assert useful_operations(SHAPE, "forward") == 600 * (64 * 10 + 4 * 24)
    assert useful_operations(SHAPE, "forward_backward") == 3 * 600 * (64 * 10 + 4 * 24)
    assert least_bytes(SHAPE, "forward") == 600 * (2 * (4 + 4 + 6 + 6) + 8)
    # Twice q, k, v, the gates and h or its cotangent, and once the gradients.
    assert least_bytes(SHAPE, "forward_backward") == 600 * (3 * (2 * 14 + 8) + 2 * 12)


def test_the_longer_of_both_times_counts():
    product = {"group": "t", "what": "product", "ms": 1.0, "operations": 500e9}
    copy = {"group": "t", "what": "copy", "ms": 1.0, "bytes": 2e9}
    bound_by_bytes = {"group": "t", "what": "x", "ms": 4.0, "operations": 500e9, "bytes": 6.7e9}
    failed = {"group": "t", "what": "y", "result": "FAILED"}
    *_, x, y = with_fractions([product, copy, bound_by_bytes, failed])
    assert x["of_sheet"] == pytest.approx(2 / 4)  # 6.7 GB at 3.35 TB/s take 2 ms.
    assert x["of_measured"] == pytest.approx(3.35 / 4)  # At 2 TB/s they take 3.35 ms.
    assert y["of_sheet"] is None
    (x,) = with_fractions([bound_by_bytes])
    assert "of_measured" not in x


def test_the_table_shows_figures_and_what_failed():
    rows = with_fractions(
        [
            {"group": "t", "what": "x", "program": "mosaic", "chunk_size": 64, "ms": 2.0}
            | {"operations": 989e9, "device": "H100", "jax_version": "0.12", "ok": True},
            {"group": "u"} | failure_row("y", ValueError("first\n\nsecond\nthird")),
        ]
    )
    file = io.StringIO()
    Console(file=file, width=300).print(rows_table(rows))
    title, *lines = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert " ".join(title) == "H100, jax 0.12"
    assert ["t", "x", "mosaic", "64", "2.000", "494.5", "50%", "ok:"] in lines
    text = "u y NOT OK: FAILED ValueError: first | second"
    assert text.split() in lines
