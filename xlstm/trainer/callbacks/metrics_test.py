import time

import jax.numpy as jnp
import pytest

from xlstm.trainer.base.throughput import Throughput
from xlstm.trainer.callbacks.metrics import MetricsCallback, fetch_metrics
from xlstm.trainer.logger.base_logger import Logger, Loggers


class _Recorder(Logger):
    def __init__(self):
        self.rows, self.steps = [], []

    def log(self, step, row):
        self.rows.append((step, row))

    def progress(self, step):
        self.steps.append(step)


def test_pairs_become_means():
    metrics = {
        "loss": (jnp.float32(12.0), jnp.float32(8.0)),
        "grad_norm": jnp.float32(0.5),
        "lr": 1e-3,
    }
    row = fetch_metrics(3, metrics)
    assert row == {"loss": 1.5, "grad_norm": 0.5, "lr": 1e-3}
    assert all(type(value) is float for value in row.values())


@pytest.mark.parametrize(
    "metrics, named",
    [
        ({"loss": (jnp.float32(jnp.nan), jnp.float32(8.0)), "lr": 1.0}, ["loss=nan"]),
        ({"loss": (jnp.float32(1.0), jnp.float32(1.0)), "grad_norm": jnp.inf}, ["grad_norm=inf"]),
        ({"loss": jnp.float32(-jnp.inf), "grad_norm": jnp.nan}, ["loss=-inf", "grad_norm=nan"]),
    ],
)
def test_metrics_that_are_not_finite_end_the_run(metrics, named):
    with pytest.raises(ValueError, match="training diverged at step 17") as caught:
        fetch_metrics(17, metrics)
    for text in named:
        assert text in str(caught.value)
    assert "lr=" not in str(caught.value)


def test_rows_are_logged_with_speeds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    recorder, throughput = _Recorder(), Throughput()
    callback = MetricsCallback(
        Loggers([recorder]),
        throughput,
        interval=2,
        tokens_per_step=100,
        flops_per_token=60,
        matmul_rate=12_000.0,
        constants={"bubble_fraction": 0.25},
    )
    now[0] = 1000.0  # Compiling and restoring, before the start.
    callback.on_start(4, None)
    for step in (5, 6, 7, 8, 9):
        now[0] += 1.0
        with throughput.pause(None):
            now[0] += 10.0
        callback.on_step(step, None, {"loss": (jnp.float32(step), jnp.float32(2.0))})
    assert recorder.steps == [5, 6, 7, 8, 9]
    same = {"tokens_per_second": 100.0, "matmul_fraction": 0.5, "bubble_fraction": 0.25}
    assert recorder.rows == [
        (6, {"loss": 3.0, "tokens": 600} | same),
        (8, {"loss": 4.0, "tokens": 800} | same),
    ]


def test_divergence_is_not_logged():
    recorder = _Recorder()
    callback = MetricsCallback(
        Loggers([recorder]),
        Throughput(),
        interval=1,
        tokens_per_step=1,
        flops_per_token=1,
        matmul_rate=1.0,
        constants={},
    )
    with pytest.raises(ValueError, match="diverged at step 1"):
        callback.on_step(1, None, {"loss": jnp.float32(jnp.nan)})
    assert recorder.rows == []
