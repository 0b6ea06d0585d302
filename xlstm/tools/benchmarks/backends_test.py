import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.tools.benchmarks.backends import random_inputs, time_candidates
from xlstm.tools.benchmarks.candidates import Candidate, Shape

SHAPE = Shape(1, 2, 8, 4, 6)


def _recorded(name, runs):
    """Returns a candidate that records its runs."""

    def note(factor):
        runs.append(name)
        return factor

    def function(q, k, v, i, f):
        factor = jax.lax.stop_gradient(jnp.sum(q * k) + jnp.sum(i * f))
        return v * jax.pure_callback(note, jax.ShapeDtypeStruct((), v.dtype), factor).astype(
            v.dtype
        )

    return Candidate(name, 0, {}, function)


def test_candidates_run_in_turn():
    runs, steps = [], []
    candidates = [_recorded("a", runs), _recorded("b", runs)]
    rows = time_candidates(SHAPE, candidates, jnp.float32, 2, lambda: steps.append(len(runs)))
    assert "".join(runs) == "aabb" * 3  # Once to warm up, and two repeats.
    assert steps == list(range(1, 13))
    assert [row["backend"] for row in rows] == ["a", "b"]


def test_figures_fit_together():
    candidates = [_recorded(name, []) for name in "ab"]
    first, second = time_candidates(SHAPE, candidates, jnp.float32, 3, lambda: None)
    operations = candidates[0].forward_operations(SHAPE)
    for row in first, second:
        for name, count in (("forward", 1), ("forward_backward", 3)):
            time = row[f"{name}_median_ms"] / 1e3
            rate = row["matmul_rate_gflop_per_s"] * 1e9
            fraction = row[f"{name}_matmul_fraction"]
            assert fraction == pytest.approx(count * operations / time / rate)
            assert 0 < row[f"{name}_min_ms"] <= row[f"{name}_median_ms"]
            ratio = row[f"{name}_median_ms"] / first[f"{name}_median_ms"]
            assert row[f"{name}_ratio_to_first"] == pytest.approx(ratio)


def test_temporary_memory_is_that_of_all_pairs():
    def function(q, k, v, i, f):
        return jnp.sin(q @ k.swapaxes(-1, -2)) @ v

    candidate = Candidate("attention", None, {}, function)
    (row,) = time_candidates(Shape(1, 1, 1024, 4, 4), [candidate], jnp.float32, 1, lambda: None)
    assert 4 <= row["forward_temporary_memory_mib"] < 64  # 1024 * 1024 float32, and some more.
    assert row["forward_backward_temporary_memory_mib"] >= 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_inputs(dtype):
    q, k, v, i, f, dh = inputs = random_inputs(Shape(2, 3, 500, 4, 6), dtype)
    assert q.shape == k.shape == (2, 3, 500, 4)
    assert v.shape == dh.shape == (2, 3, 500, 6)
    assert i.shape == f.shape == (2, 3, 500)
    assert [x.dtype for x in inputs] == [dtype] * 3 + [jnp.float32] * 2 + [dtype]
    assert abs(float(jnp.mean(i))) < 0.2 and abs(float(jnp.mean(f)) - 4) < 0.2
    again = random_inputs(Shape(2, 3, 500, 4, 6), dtype)
    assert all(np.array_equal(x, y) for x, y in zip(inputs, again, strict=True))
