import os
import struct
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from xlstm.testing.patience import PATIENCE
from xlstm.trainer.logger.tensorboard import TensorBoardLogger


def _events(directory):
    """Reads the events of all files, oldest first; a record is length, CRC, data, CRC."""
    events = []
    for name in sorted(os.listdir(directory)):
        with open(os.path.join(directory, name), "rb") as file:
            while header := file.read(12):
                (length,) = struct.unpack("<Q", header[:8])
                events.append(Event.FromString(file.read(length)))
                file.read(4)
    return events


def _scalars(directory):
    return [
        (event.step, value.tag, value.simple_value)
        for event in _events(directory)
        for value in event.summary.value
    ]


def test_every_metric_is_a_scalar(tmp_path):
    logger = TensorBoardLogger(str(tmp_path / "tensorboard"), 0)
    logger.log(1, {"loss": 2.5, "tokens": 512})
    logger.log(1, {"val_loss": 2.25})
    logger.log(2, {"loss": 2.0})
    logger.close()
    assert _scalars(tmp_path / "tensorboard") == [
        (1, "loss", 2.5),
        (1, "tokens", 512.0),
        (1, "val_loss", 2.25),
        (2, "loss", 2.0),
    ]


def test_a_row_is_there_at_once(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), 0)
    for step in range(3):
        logger.log(step, {"loss": 1.0})
        assert len(_scalars(tmp_path)) == step + 1
    logger.close()


_FULL_DISK = f"""
import resource, sys
from {TensorBoardLogger.__module__} import TensorBoardLogger

logger = TensorBoardLogger(sys.argv[1], 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for step in range(100):
    logger.log(step, {{"loss": 1.0}})
logger.close()
print("the end")
"""


def test_a_full_disk_is_told_once_and_holds_nobody_up(tmp_path):
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (0, "the end\n"), result.stderr
    assert result.stderr.count("cannot be written ([Errno 27] File too large)") == 1
    assert "Traceback" not in result.stderr


def _shown(directory):
    """Returns what TensorBoard shows: a START event drops earlier events from its step on."""
    shown = []
    for event in _events(directory):
        if event.session_log.status == SessionLog.START:
            shown = [scalar for scalar in shown if scalar[0] < event.step]
        shown += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return shown


@pytest.mark.parametrize("first_step", [0, 1, 3])
def test_a_run_that_goes_on_shows_no_step_twice(tmp_path, first_step):
    logger = TensorBoardLogger(str(tmp_path), 0)
    for step in range(6):
        logger.log(step, {"loss": 1.0})
    logger.close()
    (first,) = tmp_path.iterdir()
    first.rename(tmp_path / "events.0")  # Its name is the time in seconds.
    logger = TensorBoardLogger(str(tmp_path), first_step)
    for step in range(first_step, 8):
        logger.log(step, {"loss": 2.0})
    logger.close()
    losses = [1.0] * first_step + [2.0] * (8 - first_step)
    assert _shown(tmp_path) == [(step, "loss", loss) for step, loss in enumerate(losses)]
