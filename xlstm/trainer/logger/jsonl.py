"""The file `metrics.jsonl`: one JSON object per line, `{"step": ..., "loss": ..., ...}`."""

import json
import os

from xlstm.files import naming_file, parse_json, write_atomically
from xlstm.trainer.logger.base_logger import Logger
from xlstm.visible_text import short_repr


def read_rows(path: str) -> list[dict[str, float]]:
    """Reads the rows of a metrics file, without an incomplete last line of a killed run.

    Args:
        path: The file; it need not exist.

    Returns:
        The rows.

    Raises:
        ValueError: If another line is not a JSON object with a step.
    """
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # A line without a newline is incomplete.
        try:
            row = parse_json(line, "the line")
        except ValueError:
            row = {}
        if not isinstance(row.get("step"), int) or not 0 <= row["step"] < 2**63:
            raise ValueError(f"{path}:{number} is not a row of metrics: {short_repr(line)}")
        rows.append(row)
    return rows


class JsonLinesLogger(Logger):
    """A logger that appends rows to a metrics file."""

    def __init__(self, path: str, first_step: int):
        """Opens the file.

        Args:
            path: The file.
            first_step: Drops rows of this step and later ones, which a killed run left: these steps
                are done again.
        """
        rows = [row for row in read_rows(path) if row["step"] < first_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the row to disk at once."""
        with naming_file(self._file.name):
            self._file.write(json.dumps({"step": step} | scalars) + "\n")
            self._file.flush()
            # A row must be on disk before the checkpoint of its step is.
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        with naming_file(self._file.name):
            self._file.close()
