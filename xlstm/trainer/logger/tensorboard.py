"""TensorBoard event files."""

import tensorboardX
from tensorboardX.proto.summary_pb2 import Summary

from xlstm.trainer.logger.base_logger import Logger

_FLUSH_SECONDS = 1


class TensorBoardLogger(Logger):
    """Writes every metric as a scalar."""

    def __init__(self, directory: str, first_step: int):
        """Opens an event file; TensorBoard drops what older ones have from `first_step` on."""
        # What is not flushed when a run is killed is missing for ever; a thread flushes.
        self._writer = tensorboardX.SummaryWriter(
            directory, purge_step=first_step, flush_secs=_FLUSH_SECONDS
        )

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes the scalars, as one event: to hand it to a thread costs more than they do."""
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        self._writer.file_writer.add_summary(Summary(value=scalars), step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
