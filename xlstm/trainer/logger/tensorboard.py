"""TensorBoard event files."""

import tensorboardX

from xlstm.trainer.logger.base_logger import Logger


class TensorBoardLogger(Logger):
    """Writes every metric as a scalar."""

    def __init__(self, directory: str, first_step: int):
        """Opens an event file; TensorBoard drops what older ones have from `first_step` on."""
        self._writer = tensorboardX.SummaryWriter(directory, purge_step=first_step)

    def log(self, step: int, row: dict[str, float]) -> None:
        """Writes the scalars."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
