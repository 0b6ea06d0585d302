import numpy as np
import pytest

from xlstm.tools.benchmarks import gpu_accuracy
from xlstm.tools.benchmarks.gpu_accuracy import CASES, HeadShape, accuracy_rows

SHAPE = HeadShape(20, 4, 6)


@pytest.fixture(scope="module")
def problem():
    return gpu_accuracy.create_problem(SHAPE)


@pytest.fixture
def programs(problem, monkeypatch):
    """The results of the programs, by name, which a test may change; at first what is expected."""
    results = {name: dict(problem.expected) for name in ("mosaic", "xla")}

    def run(name, problem):
        if isinstance(results[name], Exception):
            raise results[name]
        return results[name]

    monkeypatch.setattr(gpu_accuracy, "create_problem", lambda shape: problem)
    monkeypatch.setattr(gpu_accuracy, "run_program", run)
    return results


def rows():
    return list(accuracy_rows([SHAPE], ["mosaic", "xla"]))


def test_the_xla_program_solves_the_problem(problem):
    errors = gpu_accuracy.errors_by_case(
        gpu_accuracy.run_program("xla", problem), problem.expected, problem
    )
    assert list(errors) == list(CASES)
    for case in CASES:
        assert all(0 <= error < 0.05 for error in errors[case].values()), (case, errors[case])
    assert 1e-4 < errors["ordinary gates"]["h"]  # It computes in bfloat16.


def test_the_problem_has_the_cases(problem):
    f = dict(zip(CASES, problem.arguments.f, strict=True))
    assert set(np.unique(f["forget gates +-40"])) == {-40, 40}
    assert abs(f["ordinary gates"].mean() - 3) < 1
    has_reset = dict(zip(CASES, problem.reset.any((1, 2)), strict=True))
    assert has_reset == {case: case == "resets" for case in CASES}


def test_exact_programs_are_ok(programs):
    found = rows()
    assert [(row["program"], row.get("ok")) for row in found] == [
        ("mosaic", True),
        ("mosaic", True),
        ("xla", None),
        ("xla", None),
        ("mosaic", True),
    ]
    assert found[0]["result"] == "h 0.0e+00, C 0.0e+00, n 0.0e+00, m 0.0e+00"


@pytest.mark.parametrize("wrong", [1.02, np.nan])
def test_an_error_names_its_array_and_case(programs, wrong):
    df = programs["mosaic"]["df"].copy()
    df[CASES.index("resets")] *= wrong
    programs["mosaic"]["df"] = df
    outputs, gradients, *_, against_xla = rows()
    assert outputs["ok"] and against_xla["ok"] and not gradients["ok"]
    assert ("df 2.0e-02*" if wrong == 1.02 else "df nan*") in gradients["result"]
    assert gradients["result"].endswith("(* above 1e-02: resets)")
    assert gradients["errors"]["ordinary gates"]["df"] == 0


def test_the_output_is_compared_with_the_xla_program(programs):
    programs["xla"]["h"] = programs["xla"]["h"] * 1.01
    *_, against_xla = rows()
    assert not against_xla["ok"] and "h 9.9e-03*" in against_xla["result"]


def test_a_program_that_fails_leaves_the_other(programs):
    programs["mosaic"] = RuntimeError("no kernel")
    failed, *others = rows()
    assert (failed["program"], failed["ok"]) == ("mosaic", False)
    assert failed["result"] == "FAILED RuntimeError: no kernel"
    assert [row["program"] for row in others] == ["xla", "xla"]


@pytest.mark.parametrize("name", ["dn", "dm"])
@pytest.mark.parametrize(("roundings", "is_ok"), [(1, True), (4, False)])
def test_sums_that_cancel_may_be_off_by_roundings_of_the_largest(
    problem, programs, name, roundings, is_ok
):
    expected, case = problem.expected, CASES.index("forget gates +-40")
    largest = max(np.linalg.norm(expected[x][case]) for x in gpu_accuracy.GRADIENTS)
    assert np.linalg.norm(expected[name][case]) < largest / 4
    wrong = expected[name].copy()
    wrong[case].flat[0] += roundings * 2**-9 * largest
    programs["mosaic"][name] = wrong
    _, gradients, *_ = rows()
    assert gradients["ok"] == is_ok
    assert ("*" in gradients["result"].partition(f"{name} ")[2]) != is_ok
