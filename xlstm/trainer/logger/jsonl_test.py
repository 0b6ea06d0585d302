import json
import re

import pytest

from xlstm.testing.full_disk import full_disk
from xlstm.trainer.logger.jsonl import JsonLinesLogger, read_rows


def test_rows_are_written_as_they_come(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonLinesLogger(str(path), 0)
    logger.log(1, {"loss": 0.1, "tokens": 512})
    # The row is visible while the run is running.
    assert path.read_text() == '{"step": 1, "loss": 0.1, "tokens": 512}\n'
    logger.log(1, {"val_loss": 1 / 3})
    logger.close()
    assert path.read_text() == (
        '{"step": 1, "loss": 0.1, "tokens": 512}\n{"step": 1, "val_loss": 0.3333333333333333}\n'
    )


def test_read_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(str(path)) == []
    path.write_text("")
    assert read_rows(str(path)) == []
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n')
    assert read_rows(str(path)) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


@pytest.mark.parametrize("torn", ["{", '{"step": 2, "loss": 2.', '{"step": 2, "loss": 2.0}'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n' + torn)
    assert read_rows(str(path)) == [{"step": 1, "loss": 2.5}]
    logger = JsonLinesLogger(str(path), 5)
    logger.log(2, {"loss": 2.25})
    logger.close()
    assert path.read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n'


def test_rows_of_steps_that_are_done_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        '{"step": 0, "val_loss": 5.0}\n',
        '{"step": 10, "loss": 3.0000000000000004}\n',
        '{"step": 10, "val_loss": 3.1}\n',
        '{"step": 11, "loss": 2.9}\n',
        '{"step": 20, "val_loss": 2.8}\n',
    ]
    path.write_text("".join(lines))
    JsonLinesLogger(str(path), 11).close()
    assert path.read_text() == "".join(lines[:3])


def test_a_fresh_run_keeps_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "val_loss": 5.0}\n{"step": 1, "loss": 3.0}\n')
    JsonLinesLogger(str(path), 0).close()
    assert path.read_text() == ""


def test_garbage_in_the_middle_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="metrics.jsonl"):
        JsonLinesLogger(str(path), 10)
    assert path.read_text() == '{"step": 1}\nnonsense\n{"step": 2}\n'


def test_numbers_survive_exactly(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    row = {"loss": 0.1 + 0.2, "lr": 1e-300, "tokens": 2**60}
    logger = JsonLinesLogger(path, 0)
    logger.log(7, row)
    logger.close()
    assert read_rows(path) == [{"step": 7} | row]
    assert json.dumps(read_rows(path)[0]) == json.dumps({"step": 7} | row)


@pytest.mark.parametrize("line", ["{}", "[]", "3", "\\xff"])
def test_a_line_that_is_no_row_is_an_error(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl:1 is not a row of metrics"):
        read_rows(str(path))


_NO_STEPS = ['"text"', "1.5", "null", "[1]", "1e3", "NaN", "-1", "9" * 30, "9" * 5000]


@pytest.mark.parametrize("step", [*_NO_STEPS, "[" * 100_000])
def test_a_step_is_a_number_of_steps(tmp_path, step):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{{"step": {step}, "loss": "\x1b[2J"}}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 is not a row of metrics: ") as caught:
        read_rows(str(path))
    message = str(caught.value).removeprefix(str(path))  # The folder's name may be long.
    assert len(message) < 150 and "\x1b" not in message


def test_a_full_disk_is_told_with_the_file(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    logger = JsonLinesLogger(path, 0)
    with full_disk(100):
        with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
            for step in range(100):
                logger.log(step, {"loss": 1.0})
        with pytest.raises(OSError, match=re.escape(path)):
            logger.close()  # It flushes the unwritten row again.
