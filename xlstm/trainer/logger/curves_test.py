import os

import matplotlib.image
import numpy as np
import pytest

from xlstm.trainer.logger.curves import Curve, axis_label, plot_curves, read_curve, smooth

_BLUE, _ORANGE = (31, 119, 180), (255, 127, 14)


def _curve(values, steps=None, label="a run"):
    steps = np.arange(len(values)) if steps is None else np.array(steps)
    return Curve(label, steps, np.array(values, np.float64))


def test_a_curve_is_the_finite_values_of_a_metric():
    nan, infinity = float("nan"), float("inf")
    rows = [
        {"step": 0, "val_loss": 5.0},
        {"step": 10, "loss": 4.0},
        {"step": 20, "loss": nan},
        {"step": 30, "loss": infinity},
        {"step": 40, "loss": 3.0, "val_loss": 3.5},
    ]
    curve = read_curve(rows, "loss", "a run")
    assert curve.label == "a run"
    assert curve.steps.tolist() == [10, 40]
    assert curve.values.tolist() == [4.0, 3.0]
    nothing = read_curve(rows, "tokens", "a run")
    assert nothing.steps.shape == nothing.values.shape == (0,)


@pytest.mark.parametrize("num_steps", [1, 10, 11, 35, 1000])
def test_smoothing_is_the_mean_over_the_last_steps(num_steps):
    steps = [3, 10, 20, 21, 22, 30, 70]
    curve = _curve([4.0, 2.0, 5.0, 1.0, 0.0, 7.0, 3.0], steps)
    smoothed = smooth(curve, num_steps)
    assert smoothed.steps.tolist() == steps
    for step, value in zip(steps, smoothed.values, strict=True):
        window = (curve.steps > step - num_steps) & (curve.steps <= step)
        assert value == pytest.approx(curve.values[window].mean())


def test_smoothing_leaves_alone_what_is_rarer():
    curve = _curve([3.0, 2.5, 2.0], [100, 200, 300])
    assert smooth(curve, 100).values.tolist() == [3.0, 2.5, 2.0]
    assert smooth(_curve([]), 100).values.shape == (0,)


def test_smoothing_forgets_a_spike():
    values = np.full(50, 2.0)
    values[10] = 1e30
    assert (smooth(_curve(values), 5).values[15:] == 2.0).all()


def _pixels(path, color):
    picture = matplotlib.image.imread(path)[..., :3]
    return np.sum(np.abs(picture - np.array(color) / 255).max(-1) < 0.02), picture.shape


def test_every_metric_has_a_panel_and_every_curve_a_color(tmp_path):
    curves = [_curve([3.0, 2.0]), _curve([2.0, 3.0])]
    one, two, fewer = (str(tmp_path / name) for name in ("one.png", "two.png", "fewer.png"))
    plot_curves({"loss": curves}, one)
    plot_curves({"loss": curves, "val_loss": curves}, two)
    plot_curves({"loss": [curves[0], _curve([])]}, fewer)
    (blue, (height, width, _)), (orange, _) = _pixels(one, _BLUE), _pixels(one, _ORANGE)
    assert 300 < height < width
    assert blue > 300 and orange > 300
    blue_of_two, (height_of_two, width_of_two, _) = _pixels(two, _BLUE)
    assert width_of_two == width and height_of_two > 1.5 * height
    assert blue_of_two > 1.5 * blue
    assert _pixels(fewer, _BLUE)[0] > 300
    assert _pixels(fewer, _ORANGE)[0] == 0
    assert sorted(os.listdir(tmp_path)) == ["fewer.png", "one.png", "two.png"]


def test_what_is_smoothed_is_pale_behind_the_means(tmp_path):
    curve = _curve(np.arange(200) % 2)
    plot_curves({"loss": [curve]}, str(tmp_path / "raw.png"))
    plot_curves({"loss": [curve]}, str(tmp_path / "smooth.png"), 50)
    raw, smoothed = (_pixels(tmp_path / name, _BLUE)[0] for name in ("raw.png", "smooth.png"))
    assert 300 < smoothed < raw / 5


@pytest.mark.parametrize(
    "metric, label",
    [
        ("val_loss", "validation loss (nats per token)"),
        ("val_loss_wiki_text", "validation loss (nats per token), wiki_text"),
        ("val_accuracy_lengths_129_256", "accuracy, lengths 129-256"),
        ("val_accuracy_lengths_24_24", "accuracy, length 24"),
        ("grad_norm", "gradient norm"),
        ("grad_norm_embeddings", "grad_norm_embeddings"),
        ("mine", "mine"),
    ],
)
def test_known_metrics_have_readable_labels(metric, label):
    assert axis_label(metric) == label


def test_chance_is_a_dashed_line_across_its_panel(tmp_path):
    panels = {"accuracy": [_curve([0.2, 0.9])], "loss": [_curve([2.0, 1.0])]}
    pictures = []
    for chance in (None, {"accuracy": 0.5}):
        path = str(tmp_path / "curves.png")
        plot_curves(panels, path, chance=chance)
        pictures.append(matplotlib.image.imread(path))
    changed = np.argwhere((pictures[0] != pictures[1]).any(axis=-1))
    height, width = pictures[0].shape[:2]
    assert len(changed) > 0.3 * width
    assert changed[:, 0].max() < height / 2  # The other panel has no line.
