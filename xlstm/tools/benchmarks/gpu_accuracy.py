"""Errors of the programs of `fwbw` in bfloat16, against the recurrence in float64."""

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.fwbw import (
    mlstm_fwbw_custom_grad,
    mLSTMBackendFwbwConfig,
)
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.testing import (
    Arguments,
    oracle,
    oracle_gradients,
    outputs_and_gradients,
    random_arguments,
    random_cotangents,
    relative_error,
)
from xlstm.tools.benchmarks.gpu_rows import failure_row

CASES = ("ordinary gates", "input gates -10", "input gates +10", "forget gates +-40", "resets")
_INPUT_BIASES = {"input gates -10": -10.0, "input gates +10": 10.0}
_NUM_HEADS = 3
_CHUNK_SIZE = 64

OUTPUTS = ("h", "C", "n", "m")
GRADIENTS = tuple(f"d{name}" for name in Arguments._fields)
# Largest relative errors in norm that bfloat16 products may cause.
OUTPUT_LIMIT, GRADIENT_LIMIT = 5e-3, 1e-2
_TWO_ROUNDINGS = 2**-8  # In bfloat16.
_FLOOR = 1e-6  # Where the expected norm is below it, the error is absolute in this unit.


class HeadShape(NamedTuple):
    """Sizes of one head."""

    time: int
    qk_dim: int
    v_dim: int


class Problem(NamedTuple):
    """Sequences of all `CASES`, with leading axes `(len(CASES), 3)`, and what is expected.

    Attributes:
        arguments: Arguments; `q`, `k` and `v` have values of bfloat16.
        reset: Bool `(..., T)`, True where the state is dropped before the token.
        cotangents: Cotangents of `(h, (C, n, m))`.
        expected: `h, C, n, m` and the gradients of the arguments, by name, in float64.
        is_well_conditioned: Tokens whose output is compared and has a cotangent, bool `(..., T)`.
    """

    arguments: Arguments
    reset: np.ndarray
    cotangents: Any
    expected: dict[str, np.ndarray]
    is_well_conditioned: np.ndarray


def create_problem(shape: HeadShape) -> Problem:
    """Draws the sequences of all cases and computes the recurrence.

    Args:
        shape: Sizes of the heads.

    Returns:
        The problem.
    """
    inputs = [_inputs(case, shape) for case in CASES]
    solve = functools.partial(oracle, stabilize_correctly=True)
    with ThreadPoolExecutor() as pool:
        solutions = list(pool.map(solve, *zip(*inputs, strict=True)))
    problems = []
    for (arguments, reset), (h, state, is_well_conditioned) in zip(inputs, solutions, strict=True):
        dh, d_state = random_cotangents(1, arguments)
        cotangents = _rounded(dh) * is_well_conditioned[..., None], d_state
        gradients = oracle_gradients(arguments, reset, cotangents, stabilize_correctly=True)
        expected = dict(zip(OUTPUTS + GRADIENTS, (h, *state, *gradients), strict=True))
        problems.append(Problem(arguments, reset, cotangents, expected, is_well_conditioned))
    return jax.tree.map(lambda *xs: np.stack(xs), *problems)


def _inputs(case: str, shape: HeadShape) -> tuple[Arguments, np.ndarray]:
    """Returns the arguments and the resets of a case."""
    rng = np.random.default_rng(0)
    dims = {"qk_dim": shape.qk_dim, "v_dim": shape.v_dim}
    bias = _INPUT_BIASES.get(case, 0.0)
    arguments = random_arguments(0, (_NUM_HEADS,), shape.time, igate_bias=bias, **dims)
    if case == "forget gates +-40":
        arguments = arguments._replace(f=rng.choice(np.float32([-40, 40]), arguments.f.shape))
    reset = np.zeros(arguments.f.shape, bool)
    if case == "resets":
        reset = rng.random(reset.shape) < 0.02
        reset[:, shape.time // 2] = True
    q, k, v = (_rounded(x) for x in arguments[:3])
    return arguments._replace(q=q, k=k, v=v), reset


def _rounded(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(jnp.bfloat16).astype(np.float32)


def run_program(implementation: str, problem: Problem) -> dict[str, np.ndarray]:
    """Runs and differentiates a program of `fwbw` in bfloat16.

    Args:
        implementation: `mosaic` or `xla`.
        problem: The problem.

    Returns:
        `h, C, n, m` and the gradients of the arguments, by name.

    Raises:
        ValueError: If the program cannot run.
    """
    outputs, gradients = outputs_and_gradients(
        _cell(implementation), problem.arguments, problem.reset, problem.cotangents
    )
    leaves = (*jax.tree.leaves(outputs), *gradients)
    return dict(zip(OUTPUTS + GRADIENTS, map(np.asarray, leaves), strict=True))


@functools.cache
def _cell(implementation: str) -> Callable:
    config = mLSTMBackendFwbwConfig(
        chunk_size=_CHUNK_SIZE,
        return_state=True,
        stabilize_correctly=True,
        implementation=implementation,
    )
    fwbw = mlstm_fwbw_custom_grad(config, jax.lax.Precision.HIGHEST)

    def cell(arguments: Arguments, reset: jax.Array) -> Any:
        qkv = (x.astype(jnp.bfloat16) for x in arguments[:3])
        h, state = fwbw(*qkv, *arguments[3:], reset=reset)
        return h.astype(jnp.float32), state

    return cell


def errors_by_case(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], problem: Problem
) -> dict[str, dict[str, float]]:
    """Returns the relative errors in norm of all outputs and gradients, by case and name.

    The gradients of the first `n` and `m` are sums over all tokens, which may cancel. So two
    roundings in bfloat16 of the largest gradient of a case do not exceed their limit, and the error
    of the gradient of `m` is relative to its two summands.
    """

    def error(n: int, name: str) -> float:
        x, y = (
            values[name][n][problem.is_well_conditioned[n]] if name == "h" else values[name][n]
            for values in (actual, expected)
        )
        if name not in ("dn", "dm"):
            return relative_error(x, y, _FLOOR)
        true = {name: problem.expected[name][n] for name in GRADIENTS}
        size = np.linalg.norm(y)
        if name == "dm":
            initial = problem.arguments.C[n], problem.arguments.n[n]
            size = sum(
                abs(np.vdot(*z)) for z in zip(initial, (true["dC"], true["dn"]), strict=True)
            )
        size += _TWO_ROUNDINGS / GRADIENT_LIMIT * max(map(np.linalg.norm, true.values()))
        return float(np.linalg.norm(np.float64(x) - y) / max(size, _FLOOR))

    return {case: {name: error(n, name) for name in expected} for n, case in enumerate(CASES)}


def accuracy_rows(
    shapes: Sequence[HeadShape], implementations: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Compares programs with the recurrence, and the output of `mosaic` with that of `xla`.

    Args:
        shapes: Sizes of the heads.
        implementations: Programs of `fwbw`.

    Yields:
        Rows, see `gpu_rows`. `result` has the largest error of each name, and `errors` all of them
        by case. Those of `mosaic` have limits; the limit of `h` also applies against `xla`.
    """
    for shape in shapes:
        problem = create_problem(shape)
        what = f"T {shape.time}, heads {shape.qk_dim}/{shape.v_dim}"
        found = {}
        for program in implementations:
            try:
                found[program] = run_program(program, problem)
            except Exception as error:  # The other programs remain.
                yield failure_row(what, error) | {"program": program}
                continue
            errors = errors_by_case(found[program], problem.expected, problem)
            for kind, names in (("outputs", OUTPUTS), ("gradients", GRADIENTS)):
                label = {"what": f"{what}: {kind} against float64", "program": program}
                yield label | _judge(errors, names, has_limits=program == "mosaic")
        if found.keys() >= {"mosaic", "xla"}:
            errors = errors_by_case(found["mosaic"], found["xla"], problem)
            label = {"what": f"{what}: h against xla", "program": "mosaic"}
            yield label | _judge(errors, ["h"], has_limits=True)


def _judge(
    errors: dict[str, dict[str, float]], names: Sequence[str], *, has_limits: bool
) -> dict[str, Any]:
    """Returns the part of a row that shows errors and says whether they are within the limits."""
    texts, above = [], {}
    for name in names:
        limit = OUTPUT_LIMIT if name in OUTPUTS else GRADIENT_LIMIT
        bad = [case for case in errors if not errors[case][name] <= limit]  # NaN is bad too.
        above |= dict.fromkeys(bad if has_limits else [])
        largest = np.max([x[name] for x in errors.values()])
        texts.append(f"{name} {largest:.1e}" + ("*" if bad and has_limits else ""))
    note = f" (* above {limit:.0e}: {', '.join(above)})" if above else ""
    row = {"result": ", ".join(texts) + note, "errors": errors}
    return row | ({"ok": not above} if has_limits else {})
