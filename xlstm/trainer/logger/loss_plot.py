"""The loss curves as a picture."""

import warnings

from xlstm.trainer.logger.base_logger import Logger, validation_suffixes
from xlstm.trainer.logger.curves import draw_picture, read_curve
from xlstm.trainer.logger.jsonl import read_rows


def plot_losses(rows: list[dict[str, float]], path: str) -> None:
    """Draws training and validation losses over steps.

    Args:
        rows: Rows of a metrics file.
        path: The PNG file to write.
    """
    labels = {"loss": "training", "val_loss": "validation"}
    for name in sorted({name for row in rows for name in row if name.startswith("val_loss_")}):
        labels[name] = f"validation on {name.removeprefix('val_loss_')}"
    curves = [read_curve(rows, name, label) for name, label in labels.items()]
    draw_picture({"loss (nats per token)": curves}, path)


class LossPlotLogger(Logger):
    """Draws the loss curves of a metrics file after every evaluation and at the end.

    A picture that cannot be written is no reason to stop: the next one shows the same and more.
    """

    def __init__(self, metrics_path: str, plot_path: str):
        """Makes the logger; it must come after the one that writes the metrics file."""
        self._metrics_path, self._plot_path = metrics_path, plot_path

    def log(self, step: int, row: dict[str, float]) -> None:
        """Draws anew when there is a validation loss."""
        if validation_suffixes(row) and step > 0:
            self.close()

    def close(self) -> None:
        """Draws everything."""
        rows = read_rows(self._metrics_path)
        try:
            plot_losses(rows, self._plot_path)
        except OSError as error:
            warnings.warn(f"{self._plot_path} cannot be written: {error}", stacklevel=2)
