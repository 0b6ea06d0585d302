import os

import matplotlib.image
import numpy as np
import pytest

from xlstm.trainer.logger.jsonl import JsonLinesLogger
from xlstm.trainer.logger.loss_plot import LossPlotLogger, plot_losses

_ROWS = [
    {"step": 0, "val_loss": 5.5},
    {"step": 1, "loss": 5.4},
    {"step": 2, "loss": 4.0},
    {"step": 2, "val_loss": 3.9},
]


def _colors(path):
    """Returns the plot's shape, and the number of pixels of each of the first two curves."""
    picture = matplotlib.image.imread(path)[..., :3]
    colors = [
        np.sum(np.abs(picture - np.array(color) / 255).max(-1) < 0.02)
        for color in ((31, 119, 180), (255, 127, 14))
    ]
    return picture.shape, colors


@pytest.mark.parametrize("rows", [_ROWS, _ROWS[1:3], _ROWS[:1]], ids=["both", "loss", "val_loss"])
def test_a_picture_is_written(tmp_path, rows):
    path = str(tmp_path / "loss.png")
    plot_losses(rows, path)
    (height, width, _), _ = _colors(path)
    assert 300 < height < width < 2000
    assert os.listdir(tmp_path) == ["loss.png"]


def test_the_curves_are_in_the_picture(tmp_path):
    pictures = {}
    for name, rows in {"both": _ROWS, "training": _ROWS[1:3]}.items():
        plot_losses(rows, str(tmp_path / name))
        pictures[name] = _colors(str(tmp_path / name))[1]
    assert pictures["both"][1] > 100  # The validation curve is opaque, in the second color,
    assert pictures["training"][1] == 0  # and missing without such rows.


def test_every_validation_set_has_a_curve(tmp_path):
    more = [{"step": step, "val_loss_code": 4.5, "val_loss_text": 5.0} for step in (0, 2)]
    pictures = []
    for name, rows in {"one": _ROWS, "three": [*_ROWS, *more]}.items():
        plot_losses(rows, str(tmp_path / name))
        picture = matplotlib.image.imread(tmp_path / name)[..., :3]
        green, red = np.array([[44, 160, 44], [214, 39, 40]]) / 255
        pictures.append([np.sum(np.abs(picture - x).max(-1) < 0.02) > 100 for x in (green, red)])
    assert pictures == [[False, False], [True, True]]


def test_the_picture_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = str(tmp_path / "loss.png")
    plot_losses(_ROWS, path)
    before = (tmp_path / "loss.png").read_bytes()

    def replace(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        plot_losses(_ROWS[:1], path)
    assert (tmp_path / "loss.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["loss.png"]


def test_the_logger_draws_after_evaluations(tmp_path):
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    rows, logger = JsonLinesLogger(str(metrics), 0), LossPlotLogger(str(metrics), str(plot))

    def log(step, row):
        rows.log(step, row)
        logger.log(step, row)

    log(0, {"val_loss": 5.5})
    log(1, {"loss": 5.0})
    assert not plot.exists()
    log(1, {"val_loss": 4.9})
    first = plot.read_bytes()
    log(2, {"loss": 1.0})
    assert plot.read_bytes() == first
    log(2, {"val_loss": 1.0})
    assert plot.read_bytes() != first
    first = plot.read_bytes()
    log(3, {"val_loss_wiki": 2.0})
    assert plot.read_bytes() != first
    rows.close()
    logger.close()


def test_a_picture_that_cannot_be_written_stops_nobody(tmp_path):
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    rows, logger = JsonLinesLogger(str(metrics), 0), LossPlotLogger(str(metrics), str(plot))
    rows.log(1, {"val_loss": 4.9})
    plot.mkdir()
    with pytest.warns(UserWarning, match="loss.png cannot be written: .*Is a directory"):
        logger.log(1, {"val_loss": 4.9})
    plot.rmdir()
    logger.close()
    assert plot.is_file()
    rows.close()
