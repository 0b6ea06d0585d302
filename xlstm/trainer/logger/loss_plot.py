"""The loss curves as a picture."""

import io

from xlstm.trainer.base.files import write_atomically
from xlstm.trainer.logger.base_logger import Logger
from xlstm.trainer.logger.jsonl import read_rows


def plot_losses(rows: list[dict[str, float]], path: str) -> None:
    """Draws training and validation loss over steps.

    Args:
        rows: Rows of a metrics file.
        path: The PNG file to write.
    """
    # Imported here, since it takes a while and the first steps can do without.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"linewidth": 0.8, "alpha": 0.7}),
        ("val_loss", "validation", {"marker": "o", "markersize": 4}),
    ):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())


class LossPlotLogger(Logger):
    """Draws the loss curves of a metrics file after every evaluation and at the end."""

    def __init__(self, metrics_path: str, plot_path: str):
        """Makes the logger; it must come after the one that writes the metrics file."""
        self._metrics_path, self._plot_path = metrics_path, plot_path

    def log(self, step: int, row: dict[str, float]) -> None:
        """Draws anew when there is a validation loss."""
        if "val_loss" in row and step > 0:
            self.close()

    def close(self) -> None:
        """Draws everything."""
        plot_losses(read_rows(self._metrics_path), self._plot_path)
