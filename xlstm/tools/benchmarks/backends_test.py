import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.tools.benchmarks.backends import random_inputs, time_candidates
from xlstm.tools.benchmarks.candidates import Candidate, Shape
from xlstm.tools.benchmarks.timed import PASSES, TimedFunction

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


class _Elsewhere(Candidate):
    """A candidate of another library, which records its calls and waits."""

    def timed_passes(self, inputs):
        for name in PASSES:
            call, wait = (lambda name=name: runs.append(name)), (lambda _: runs.append("wait"))
            yield name, TimedFunction(call, wait, compile_time=2.0, temporary_memory=3 * 2**20)


runs = []


def test_functions_of_another_library_run_in_turn_with_ours():
    candidates = [_recorded("a", runs), _Elsewhere("b", 64, {}, len, "kernel")]
    _, row = time_candidates(SHAPE, candidates, jnp.float32, 2, lambda: None)
    round_of_both = ["a", "a", "forward", "wait", "forward_backward", "wait"]
    assert runs == ["a", "a", *round_of_both, *round_of_both]  # The first two warm up.
    assert (row["backend"], row["implementation"], row["chunk_size"]) == ("b", "kernel", 64)
    assert row["forward_compile_s"] == 2 and row["forward_temporary_memory_mib"] == 3


def test_a_wait_follows_several_calls():
    order = []
    function = TimedFunction(lambda: order.append("call"), lambda _: order.append("wait"), 0.0, 0)
    function.run(calls=3)
    assert order == ["call"] * 3 + ["wait"] and len(function.times) == 1


def test_a_candidate_that_fails_is_left_out_if_the_caller_takes_its_error():
    def fails(*inputs):
        raise TypeError("no such kernel")

    candidates = [Candidate("bad", 0, {}, fails), _recorded("good", [])]
    failures = []
    note = lambda *failure: failures.append(failure)  # noqa: E731
    rows = time_candidates(SHAPE, candidates, jnp.float32, 1, lambda: None, on_failure=note)
    assert [row["backend"] for row in rows] == ["good"]
    assert [(x.name, str(error)) for x, error in failures] == [("bad", "no such kernel")]
    with pytest.raises(TypeError, match="no such kernel"):
        time_candidates(SHAPE, candidates, jnp.float32, 1, lambda: None)


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
    assert q.shape == k.shape == (6, 500, 4)
    assert v.shape == dh.shape == (6, 500, 6)
    assert i.shape == f.shape == (6, 500)
    assert [x.dtype for x in inputs] == [dtype] * 3 + [jnp.float32] * 2 + [dtype]
    assert abs(float(jnp.mean(i))) < 0.2 and abs(float(jnp.mean(f)) - 4) < 0.2
    again = random_inputs(Shape(2, 3, 500, 4, 6), dtype)
    assert all(np.array_equal(x, y) for x, y in zip(inputs, again, strict=True))
