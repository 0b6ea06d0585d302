import sys

import jax
import jax.numpy as jnp
import pytest

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import implementation
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.tools.benchmarks import candidates
from xlstm.tools.benchmarks.candidates import (
    Candidate,
    Shape,
    backend_candidates,
    external_candidates,
    parse_chunk_size,
    parse_shape,
)

MODULE = """
import jax.numpy as jnp

def mean(q, k, v, i, f, chunk_size):
    return v * (2 if chunk_size is None else chunk_size)

def fails(q, k, v, i, f, chunk_size):
    return q @ v

def pair(q, k, v, i, f, chunk_size):
    return v, v

def short(q, k, v, i, f, chunk_size):
    return v[:, :, 1:]

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_mlstm.py").write_text(MODULE)
    (tmp_path / "broken_mlstm.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_mlstm"
    sys.modules.pop("their_mlstm", None)


SHAPE = Shape(1, 2, 8, 4, 6)


def inputs():
    q, v = jnp.ones((2, 8, 4)), jnp.ones((2, 8, 6))
    return q, q, v, q[..., 0], q[..., 0]


def test_shapes():
    shape = parse_shape("1x2x8x4x6")
    assert shape == Shape(1, 2, 8, 4, 6)
    assert str(shape) == "1x2x8x4x6"


@pytest.mark.parametrize("text", ["", "1x2x8x4", "1x2x8x4x6x1", "1x2x8x4x0", "1x2x8x4x-6", "axbxc"])
def test_malformed_shapes(text):
    with pytest.raises(ValueError, match=f"--shapes={text}: expected five sizes"):
        parse_shape(text)


@pytest.mark.parametrize("text", ["", "-1", "1.5", "x"])
def test_malformed_chunk_sizes(text):
    assert parse_chunk_size("0") == 0
    with pytest.raises(ValueError, match=f"--chunk_sizes={text}: expected a whole number"):
        parse_chunk_size(text)


def test_a_backend_takes_its_options_and_the_chunk_sizes_if_it_knows_chunks():
    choice = BackendConfig("fwbw", stabilize_correctly=False, keep_G=False)
    one, some = backend_candidates(choice, [0, 4], ["xla"], SHAPE, jnp.float32)
    assert (one.name, one.chunk_size, some.chunk_size) == ("fwbw", 0, 4)
    assert some.options["keep_G"] is False and "chunk_size" not in some.options
    h, same_h = (jax.jit(candidate.function)(*inputs()) for candidate in (one, some))
    assert jnp.allclose(h, same_h, rtol=1e-4)
    recurrent = BackendConfig("recurrent")
    (recurrent,) = backend_candidates(recurrent, [0, 4], ["xla", "auto"], SHAPE, jnp.float32)
    assert (recurrent.chunk_size, recurrent.options) == (None, {"stabilize_correctly": True})
    assert (one.implementation, recurrent.implementation) == ("xla", "")


def test_each_implementation_is_a_candidate_and_kernels_have_their_own_chunk(monkeypatch):
    hopper = implementation.Device("gpu", "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(candidates, "current_device", lambda: hopper)

    def found(dtype, *implementations):
        choice = BackendConfig("fwbw")
        rows = backend_candidates(choice, [32, 256], implementations, SHAPE, dtype)
        return [(row.implementation, row.chunk_size) for row in rows]

    xla = [("xla", 32), ("xla", 256)]
    assert found(jnp.bfloat16, "mosaic", "xla") == [("mosaic", 64), *xla]
    assert found(jnp.bfloat16, "auto", "mosaic") == [("mosaic", 64)]
    assert found(jnp.float32, "auto", "xla") == xla  # Without repetitions.
    assert found(jnp.bfloat16, "xla", "auto")[-1] == ("mosaic", 64)
    (default,) = backend_candidates(BackendConfig(), [-1, 64], ["xla"], SHAPE, jnp.bfloat16)
    assert default.chunk_size == default.function.config.chunk_size == 64  # That of a GPU.
    (kernels,) = backend_candidates(BackendConfig(), [0], ["mosaic"], SHAPE, jnp.bfloat16)
    assert kernels.options["implementation"] == "mosaic"
    assert kernels.forward_operations(SHAPE) == 16 * (8 * 10 + 4 * 24)
    with pytest.raises(ValueError, match="mosaic cannot be used: it needs bfloat16"):
        found(jnp.float32, "xla", "mosaic")


def test_a_chunk_above_the_sequence_does_not_fit():
    shape = Shape(1, 2, 8, 4, 6)
    fits = [Candidate("fwbw", size, {}, len).fits(shape) for size in (None, 0, 7, 8, 9)]
    assert fits == [True, True, True, True, False]


def test_operations():
    shape = Shape(2, 3, 100, 4, 6)

    def per_token(name, chunk_size):
        return Candidate(name, chunk_size, {}, len).forward_operations(shape) / 600

    assert per_token("fwbw", 10) == 10 * 10 + 4 * 24
    assert per_token("fwbw", 0) == 100 * 10 + 4 * 24
    assert per_token("their:mlstm", 10) == per_token("fwbw", 10)
    assert per_token("parallel_stabilized", None) == 100 * 10
    assert per_token("recurrent", None) == 5 * 24


def test_an_external_function_gets_the_chunk_size(module):
    one, some, default = external_candidates(f"{module}:mean", [0, 5, -1], SHAPE)
    assert default.function(*inputs())[0, 0, 0] == default.chunk_size == 32  # That of a CPU.
    assert (one.name, one.chunk_size, some.chunk_size) == ("their_mlstm:mean", 0, 5)
    assert one.function(*inputs()).shape == (2, 8, 6)
    assert one.function(*inputs())[0, 0, 0] == 2
    assert some.function(*inputs())[0, 0, 0] == 5


@pytest.mark.parametrize(
    "name, message",
    [
        ("their_mlstm", "expected module:function"),
        (":mean", "expected module:function"),
        ("no_such_module:mean", "cannot be imported: ModuleNotFoundError"),
        ("broken_mlstm:mean", "cannot be imported: ZeroDivisionError"),
        ("their_mlstm:meen", "their_mlstm has no function meen"),
        ("their_mlstm:number", "their_mlstm has no function number"),
    ],
)
def test_unknown_external_functions(module, name, message):
    with pytest.raises(ValueError, match=f"--external={name}: .*{message}"):
        external_candidates(name, [0], SHAPE)


@pytest.mark.parametrize(
    "name, message",
    [
        ("fails", r"failed for q \(1, 2, 8, 4\), v \(1, 2, 8, 6\) and chunk_size=3: TypeError: "),
        ("pair", r"returned tuple, expected h \(1, 2, 8, 6\)"),
        ("short", r"returned \(1, 2, 7, 6\), expected h \(1, 2, 8, 6\)"),
    ],
)
def test_external_functions_that_fail(module, name, message):
    (candidate,) = external_candidates(f"{module}:{name}", [3], SHAPE)
    with pytest.raises(ValueError, match=message):
        candidate.function(*inputs())
