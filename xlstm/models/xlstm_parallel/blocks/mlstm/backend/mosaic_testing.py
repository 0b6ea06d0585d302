"""Problems for the tests of the kernels: bfloat16 inputs, with all kinds of gates in one batch."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.xlstm_parallel.blocks.mlstm.backend import testing
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.decayed_attention import (
    decayed_attention_xla,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.hopper import (
    CAN_INTERPRET,
    decayed_attention_hopper,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.implementation import interpreted_kernels
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.inputs import MLSTMArguments
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.mosaic import mlstm_mosaic

CASES = (
    "ordinary",
    "input bias -10",
    "input bias +10",
    "forget +40",
    "forget -40",
    "forget +-40",
    "some forget gates nearly shut",
)
_NAMES = ("h", "C", "n", "m", *(f"d{name}" for name in testing.Arguments._fields))
_TWO_ROUNDINGS = 2**-8  # Largest relative error of two roundings in bfloat16.
_LEAST = 1e-6  # Where the norm of what is expected is less, errors are relative to this.


def has_interpreter() -> bool:
    """Returns whether kernels can be interpreted, or must be: `.ci/run` asks for it."""
    can_be = CAN_INTERPRET and jax.default_backend() == "cpu"
    return can_be or "XLSTM_TEST_INTERPRETER" in os.environ


class Problem(NamedTuple):
    """A sequence for each of `CASES`, as heads of one example, with what is expected in float64.

    Attributes:
        arguments: Arguments with leading axes `(1, len(CASES))`; `q`, `k` and `v` are bfloat16.
        reset: Bool `(1, len(CASES), T)`, in every second case.
        cotangents: Cotangents of `(h, (C, n, m))`.
        expected: Values of `h`, `C`, `n`, `m` and gradients of the arguments.
        is_well_conditioned: Tokens whose output is compared and has a cotangent.
    """

    arguments: testing.Arguments
    reset: np.ndarray
    cotangents: Any
    expected: tuple
    is_well_conditioned: np.ndarray


def _forget_gates(case: str, rng: np.random.Generator, time: int) -> np.ndarray:
    noise = rng.standard_normal(time)
    if case == "some forget gates nearly shut":
        return np.where(rng.random(time) < 0.03, -10, 5) + noise
    centers = {"forget +40": [40], "forget -40": [-40], "forget +-40": [-40, 40]}
    return rng.choice(centers.get(case, [3]), time) + noise


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


@functools.cache
def problem(time: int, qk_dim: int, v_dim: int, stabilize_correctly: bool = True) -> Problem:
    """Creates the problem."""
    biases = {"input bias -10": -10.0, "input bias +10": 10.0}
    arguments, resets = [], []
    for seed, case in enumerate(CASES):
        rng = np.random.default_rng([seed, time])
        bias = biases.get(case, 0.0)
        dims = {"qk_dim": qk_dim, "v_dim": v_dim}
        drawn = testing.random_arguments(seed + time, (), time, igate_bias=bias, **dims)
        arguments.append(drawn._replace(f=np.float32(_forget_gates(case, rng, time))))
        reset = rng.random(time) < 0.03
        reset[time // 2] = True
        resets.append(reset & ((seed + time) % 2 == 0))
    arguments = jax.tree.map(lambda *xs: np.stack(xs)[None], *arguments)
    arguments = arguments._replace(**{x: _rounded(getattr(arguments, x)) for x in "qkv"})
    reset, options = np.stack(resets)[None], {"stabilize_correctly": stabilize_correctly}
    h, state, is_well_conditioned = testing.oracle(arguments, reset, **options)
    dh, d_state = testing.random_cotangents(time, arguments)
    cotangents = _rounded(dh) * is_well_conditioned[..., None], d_state
    gradients = testing.oracle_gradients(arguments, reset, cotangents, **options)
    arguments = arguments._replace(**{x: jnp.bfloat16(getattr(arguments, x)) for x in "qkv"})
    cotangents = jnp.bfloat16(cotangents[0]), d_state
    expected = h, *state, *gradients
    return Problem(arguments, reset, cotangents, expected, is_well_conditioned)


def solve(problem: Problem, run: str, num_parts: int = 1, **options) -> tuple:
    """Computes outputs, last states and gradients.

    Args:
        problem: The problem.
        run: `kernel`, `twin` (the same roundings in XLA) or `fwbw` (the XLA program).
        num_parts: Number of parts of the sequences, each on its own device.
        **options: Options of `fwbw`.

    Returns:
        Values as in `Problem.expected`.
    """
    config = mLSTMBackendFwbwConfig(
        **{"chunk_size": 64, "stabilize_correctly": True, "keep_c": True} | options,
        return_state=True,
        implementation="xla",
    )
    axis = None if num_parts == 1 else "cp"
    attend = {"kernel": decayed_attention_hopper, "twin": decayed_attention_xla}.get(run)

    def cell(arguments, reset):
        if run == "fwbw":
            h, state = mlstm_fwbw_custom_grad(config, None, axis)(*arguments, reset=reset)
        else:
            h, state = mlstm_mosaic(MLSTMArguments(*arguments), reset, config, axis, attend)
        return h, tuple(state)

    whole = cell if num_parts == 1 else testing.in_parts(cell, num_parts)
    outputs, gradients = testing.outputs_and_gradients(
        whole, problem.arguments, problem.reset, problem.cotangents
    )
    return outputs[0], *outputs[1], *gradients


def assert_close(
    problem: Problem, actual: tuple, expected: tuple, outputs: float, gradients: float
):
    """Asserts that the errors of all leaves are within their limits, case by case.

    The error of a leaf is the norm of the difference. Where `h` hardly depends on a leaf, such as
    on the query of a first token, its gradient is what remains of sums that cancel. So a gradient
    may also be off by two roundings in bfloat16 of the largest gradient of the case, and that of
    `m` is compared with its two summands.

    Args:
        problem: The problem.
        actual: Values as in `Problem.expected`.
        expected: What to compare with, likewise.
        outputs: Limit of the error of outputs and states, relative to the leaf.
        gradients: Limit of the error of gradients, relative to the leaf.
    """
    wrong = []
    for at, case in enumerate(CASES):
        mask = problem.is_well_conditioned[0, at]
        initial = [x[0, at] for x in problem.arguments[5:7]]
        true_gradients = [x[0, at] for x in problem.expected[4:]]
        largest = max(np.linalg.norm(x) for x in true_gradients)
        for name, x, y in zip(_NAMES, actual, expected, strict=True):
            x, y = (np.asarray(z[0, at], np.float64) for z in (x, y))
            if name == "h":
                x, y = x[mask], y[mask]
            norm, limit = np.linalg.norm(y), outputs * max(np.linalg.norm(y), _LEAST)
            if name == "dm":
                norm = sum(abs(np.vdot(*z)) for z in zip(initial, true_gradients[5:7], strict=True))
            if name.startswith("d"):
                limit = gradients * norm + _TWO_ROUNDINGS * largest
            if not np.linalg.norm(x - y) <= limit:
                wrong.append(
                    f"{case}: {name} is off by {np.linalg.norm(x - y):.1e}, and may be off by"
                    f" {limit:.1e}; its norm is {norm:.1e}, the largest gradient's {largest:.1e}"
                )
    if wrong:
        raise AssertionError("\n".join(wrong))


def assert_kernels_solve(
    time: int, qk_dim: int, v_dim: int, stabilize_correctly: bool = True
) -> None:
    """Asserts that interpreted kernels agree with float64, with their twin, and with `fwbw`."""
    problem_ = problem(time, qk_dim, v_dim, stabilize_correctly)
    options = {"stabilize_correctly": stabilize_correctly}
    with interpreted_kernels():
        actual = jax.block_until_ready(solve(problem_, "kernel", **options))
    assert_close(problem_, actual, problem_.expected, 5e-3, 1e-2)
    # The gradients of `fwbw` in bfloat16 have larger errors of their own.
    twin, fwbw = (solve(problem_, run, **options) for run in ("twin", "fwbw"))
    wrong = []
    for run, limit, expected in (("twin", 1e-3, twin), ("fwbw", 5e-3, fwbw[:4])):
        for name, x, y in zip(_NAMES, actual, expected, strict=False):
            if name == "h":
                x, y = (np.asarray(z)[problem_.is_well_conditioned] for z in (x, y))
            if not (error := testing.relative_error(x, y, _LEAST)) < limit:
                wrong.append(f"{name} differs from that of {run} by {error:.1e}")
    if wrong:
        raise AssertionError("\n".join(wrong))
