import os
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from xlstm.trainer.logger.tensorboard import TensorBoardLogger


def _events(directory):
    """The events of all files, oldest file first; a record is length, check, data, check."""
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


@pytest.mark.parametrize("first_step", [1, 11])
def test_what_is_done_again_is_purged(tmp_path, first_step):
    logger = TensorBoardLogger(str(tmp_path), first_step)
    logger.log(first_step, {"loss": 1.5})
    logger.close()
    # TensorBoard forgets older events from the step of a START event on.
    starts = [event.step for event in _events(tmp_path) if event.session_log.status == 1]
    assert starts == [first_step]
