"""Runs pytest on the files of an `xlstm_test`, and tells Bazel what came of it.

Bazel's variables: XML_OUTPUT_FILE takes the results test by test, TESTBRIDGE_TEST_ONLY is the
`--test_filter` (an expression as for `pytest -k`), TEST_TMPDIR is the place for temporary files.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

import pytest


def _keep_to(folder: str) -> None:
    """Points the libraries that write to the home or working folder to `folder`."""
    os.environ["HOME"] = folder
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(folder, "hypothesis")


def _make_hypothesis_repeatable() -> None:
    """Lets hypothesis try the same examples every time: a result must not depend on luck."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    import hypothesis

    settings = hypothesis.settings
    settings.register_profile("bazel", derandomize=True, database=None, deadline=None)
    settings.load_profile("bazel")


def _pytest_arguments() -> list[str]:
    """Returns the arguments of pytest that stand for Bazel's environment variables."""
    # No configuration, cache or plugin from outside; modules under their full names.
    arguments = ["-c", os.devnull, "--rootdir", os.curdir, "--no-header"]
    arguments += ["-p", "no:cacheprovider", "--import-mode=importlib"]
    arguments += ["-o", "consider_namespace_packages=true"]
    if folder := os.environ.get("TEST_TMPDIR"):
        arguments += ["--basetemp", os.path.join(folder, "pytest")]
    if results := os.environ.get("XML_OUTPUT_FILE"):
        arguments += ["--junit-xml", results]
    if expression := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        arguments += ["-k", expression]
    return arguments


def main(arguments: Sequence[str]) -> int:
    """Runs pytest with the environment that Bazel gives.

    Args:
        arguments: test files, and any options of pytest.

    Returns:
        The exit status: 0 if all tests passed. Running no test at all is a failure, unless a filter
        left none.
    """
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Tolerances are those of float32; a GPU would multiply in TF32 unless asked otherwise.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    if folder := os.environ.get("TEST_TMPDIR"):
        _keep_to(folder)
    _make_hypothesis_repeatable()
    status = pytest.main([*_pytest_arguments(), *arguments])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and os.environ.get("TESTBRIDGE_TEST_ONLY"):
        return 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
