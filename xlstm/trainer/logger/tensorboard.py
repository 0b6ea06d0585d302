"""TensorBoard event files."""

import tensorboardX

from xlstm.trainer.logger.base_logger import Logger


class TensorBoardLogger(Logger):
    """Writes every metric as a scalar."""

    def __init__(self, directory: str, start_step: int):
        """Opens an event file; TensorBoard drops what older ones have after `start_step`."""
        self._writer = tensorboardX.SummaryWriter(directory, purge_step=start_step + 1)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes the scalars."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
