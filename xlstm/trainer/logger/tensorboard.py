"""TensorBoard event files."""

import os
import time
import warnings

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from xlstm.trainer.logger.base_logger import Logger


class TensorBoardLogger(Logger):
    """A logger that writes every metric as a scalar.

    If the file can no longer be written, it warns and stops: the metrics file has every row.
    """

    def __init__(self, directory: str, first_step: int):
        """Opens an event file; TensorBoard drops older events from `first_step` on."""
        os.makedirs(directory, exist_ok=True)
        # Not `SummaryWriter`: its thread ends when the disk is full, and then its full queue blocks
        # the run.
        self._writer = EventsWriter(os.path.join(directory, "events"))
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(
            Event(wall_time=time.time(), step=first_step, file_version="brain.Event:2")
        )
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Writes the scalars as one event, at once."""
        if self._writer is None:
            return
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            # TensorBoard cannot read past an incomplete record.
            self._writer = None
            warnings.warn(
                f"the TensorBoard event file cannot be written ({error}): the run continues without"
                " it until it is restarted; metrics.jsonl has every row",
                stacklevel=2,
            )

    def close(self) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()
