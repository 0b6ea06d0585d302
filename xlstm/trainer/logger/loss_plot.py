"""Plots of the loss curves."""

import warnings

from xlstm.trainer.logger.base_logger import Logger, validation_suffixes
from xlstm.trainer.logger.curves import plot_curves, read_curve
from xlstm.trainer.logger.jsonl import read_rows


def plot_losses(rows: list[dict[str, float]], path: str) -> None:
    """Plots training and validation losses over steps.

    Args:
        rows: Rows of a metrics file.
        path: The PNG file to write.
    """
    labels = {"loss": "training", "val_loss": "validation"}
    for name in sorted({name for row in rows for name in row if name.startswith("val_loss_")}):
        labels[name] = f"validation on {name.removeprefix('val_loss_')}"
    curves = [read_curve(rows, name, label) for name, label in labels.items()]
    plot_curves({"loss (nats per token)": curves}, path)


class LossPlotLogger(Logger):
    """A logger that plots the losses of a metrics file after every evaluation and at the end.

    It warns if it cannot write the plot: the next one will show the same losses.
    """

    def __init__(self, metrics_path: str, plot_path: str):
        """Creates the logger, which must come after the one that writes the metrics file."""
        self._metrics_path, self._plot_path = metrics_path, plot_path

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Updates the plot if there is a validation loss."""
        if validation_suffixes(scalars) and step > 0:
            self.close()

    def close(self) -> None:
        """Plots all rows."""
        rows = read_rows(self._metrics_path)
        try:
            plot_losses(rows, self._plot_path)
        except OSError as error:
            warnings.warn(f"{self._plot_path} cannot be written: {error}", stacklevel=2)
