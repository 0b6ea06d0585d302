import time

import jax.numpy as jnp
import pytest

from xlstm.trainer.base.throughput import Throughput, measure_matmul_rate


class _Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


def test_tokens_over_time(clock):
    throughput = Throughput()
    throughput.add(300)
    throughput.add(700)
    clock.now += 4.0
    assert throughput.lap() == 250.0


def test_a_lap_begins_a_new_count(clock):
    throughput = Throughput()
    throughput.add(1000)
    clock.now += 1.0
    throughput.lap()
    throughput.add(10)
    clock.now += 5.0
    assert throughput.lap() == 2.0


def test_pauses_do_not_count(clock):
    throughput = Throughput()
    throughput.add(100)
    clock.now += 1.0
    for _ in range(2):
        with throughput.pause(None):
            clock.now += 50.0
    clock.now += 1.0
    assert throughput.lap() == 50.0
    throughput.add(100)
    clock.now += 1.0
    assert throughput.lap() == 100.0  # A pause belongs to its lap.


def test_a_pause_ends_with_an_error(clock):
    throughput = Throughput()
    with pytest.raises(KeyError), throughput.pause(None):
        clock.now += 50.0
        raise KeyError
    throughput.add(100)
    clock.now += 1.0
    assert throughput.lap() == 100.0


def test_a_lap_of_no_time_is_a_number(clock):
    assert Throughput().lap() == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_rate_is_plausible(dtype):
    assert 1e8 < measure_matmul_rate(dtype, seconds=0.0) < 1e16
