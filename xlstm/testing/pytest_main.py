"""The main program of an `xlstm_test`: runs pytest on its files and reports the results to Bazel.

It reads Bazel's environment variables: XML_OUTPUT_FILE (the file for the result of each test),
TESTBRIDGE_TEST_ONLY (the `--test_filter`, an expression of `pytest -k`) and TEST_TMPDIR (the folder
for temporary files). XLSTM_TEST_QUICK_COMPILATION=0 is the rule's `quick_compilation = False`.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence

import pytest


def _keep_to(folder: str) -> None:
    """Makes libraries that write to the home or working folder use `folder`."""
    os.environ["HOME"] = folder
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = os.path.join(folder, "hypothesis")


def _compile_quickly() -> None:
    """Makes XLA compile without optimizing for a CPU: tests compile much and compute little."""
    if os.environ.get("XLSTM_TEST_QUICK_COMPILATION") == "0":
        return
    if os.environ["JAX_PLATFORMS"] == "cpu" and importlib.util.find_spec("jax"):
        from xlstm.testing.quick_compilation import QUICK_XLA_FLAGS

        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} {QUICK_XLA_FLAGS}".strip()


def _make_hypothesis_repeatable() -> None:
    """Makes hypothesis try the same examples every time, so that results are reproducible."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    import hypothesis

    settings = hypothesis.settings
    settings.register_profile("bazel", derandomize=True, database=None, deadline=None)
    settings.load_profile("bazel")


def _pytest_arguments(own: Sequence[str]) -> list[str]:
    """Returns the arguments of a test with those for Bazel's environment variables."""
    own = list(own)
    # Use no external configuration, cache or plugin; import modules by their full names.
    arguments = ["-c", os.devnull, "--rootdir", os.curdir, "--no-header"]
    arguments += ["-p", "no:cacheprovider", "--import-mode=importlib"]
    arguments += ["-o", "consider_namespace_packages=true"]
    if folder := os.environ.get("TEST_TMPDIR"):
        arguments += ["--basetemp", os.path.join(folder, "pytest")]
    if results := os.environ.get("XML_OUTPUT_FILE"):
        arguments += ["--junit-xml", results]
    if expression := os.environ.get("TESTBRIDGE_TEST_ONLY"):
        if "-k" in own:  # pytest would use the last one only.
            index = own.index("-k")
            expression = f"({own[index + 1]}) and ({expression})"
            del own[index : index + 2]
        arguments += ["-k", expression]
    return arguments + own


def main(arguments: Sequence[str]) -> int:
    """Runs pytest in the environment that Bazel sets.

    Args:
        arguments: The test files, and options of pytest.

    Returns:
        The exit status: 0 if all tests passed. Running no test is a failure, unless a filter
        excludes all of them.
    """
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # The tolerances of tests assume float32; the default on GPUs is TF32.
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
    _compile_quickly()
    if folder := os.environ.get("TEST_TMPDIR"):
        _keep_to(folder)
    _make_hypothesis_repeatable()
    status = pytest.main(_pytest_arguments(arguments))
    if status == pytest.ExitCode.NO_TESTS_COLLECTED and os.environ.get("TESTBRIDGE_TEST_ONLY"):
        return 0
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
