import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from xlstm.testing.quick_compilation import QUICK_XLA_FLAGS

_MAIN = os.path.join(os.path.dirname(__file__), "pytest_main.py")

_TESTS = """
import os
import hypothesis

def test_passes():
    assert True

def test_fails():
    assert False

def test_repeatable(tmp_path):
    assert hypothesis.settings().derandomize and hypothesis.settings().database is None
    assert tmp_path.is_relative_to(os.environ["TEST_TMPDIR"])
    assert os.path.expanduser("~") == os.environ["TEST_TMPDIR"]

def test_float32_is_multiplied_in_float32():
    assert os.environ["JAX_DEFAULT_MATMUL_PRECISION"] == "highest"
"""

_COMPILES_QUICKLY = f"""
import os

def test_compiles_quickly():
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here {QUICK_XLA_FLAGS}"
"""

_COMPILES_AS_ALWAYS = """
import os

def test_compiles_as_always():
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=here"
"""


@pytest.fixture
def run(tmp_path):
    """Returns a function that runs the main program on a file of tests, in its own process."""

    def run(tests, *arguments, **env):
        (tmp_path / "some_test.py").write_text(tests)
        from_outside = (
            "TESTBRIDGE_TEST_ONLY",
            "JAX_DEFAULT_MATMUL_PRECISION",
            "XLSTM_TEST_QUICK_COMPILATION",
        )
        env = {k: v for k, v in os.environ.items() if k not in from_outside} | env
        env |= {"XML_OUTPUT_FILE": str(tmp_path / "results.xml"), "TEST_TMPDIR": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-S", _MAIN, "some_test.py", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )

    return run


def _results(tmp_path):
    suite = ElementTree.parse(tmp_path / "results.xml").getroot().find("testsuite")
    return int(suite.get("tests")), int(suite.get("failures"))


def test_a_failure_is_reported_and_counted(run, tmp_path):
    result = run(_TESTS)
    assert result.returncode == 1
    assert "test_fails" in result.stdout
    assert _results(tmp_path) == (4, 1), result.stdout


def test_quick_compilation(run):
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_dump_to=here"}
    result = run(_COMPILES_QUICKLY, **env)
    assert result.returncode == 0, result.stdout
    result = run(_COMPILES_AS_ALWAYS, **env, XLSTM_TEST_QUICK_COMPILATION="0")
    assert result.returncode == 0, result.stdout
    result = run(_COMPILES_AS_ALWAYS, **env | {"JAX_PLATFORMS": "cuda"})
    assert result.returncode == 0, result.stdout


def test_filter(run, tmp_path):
    assert run(_TESTS, TESTBRIDGE_TEST_ONLY="passes or repeatable").returncode == 0
    assert _results(tmp_path) == (2, 0)


def test_a_filter_selects_among_the_tests_of_a_target(run, tmp_path):
    result = run(_TESTS, "-k", "passes or repeatable", TESTBRIDGE_TEST_ONLY="passes or fails")
    assert result.returncode == 0
    assert _results(tmp_path) == (1, 0)


def test_a_filter_may_leave_no_test(run):
    assert run(_TESTS, TESTBRIDGE_TEST_ONLY="nothing").returncode == 0


def test_a_file_without_tests_fails(run):
    assert run("").returncode != 0


def test_a_file_that_cannot_be_imported_fails(run):
    assert run("import no_such_module").returncode != 0
