"""Runs every block of commands and of Python in README.md and docs/ as it is printed.

`./bazelw` is a stand-in that starts the tools of this checkout, with flags that shorten what would
take minutes. Only blocks of `sh` and `python` are run.
"""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

from xlstm.testing.patience import PATIENCE

_DOCS = pathlib.Path(__file__).parent
_PAGES = {page.name: page for page in sorted(_DOCS.glob("*.md"))} | {
    "README.md": _DOCS.parent / "README.md",
    "docs/README.md": _DOCS / "README.md",
    "CONTRIBUTING.md": _DOCS.parent / "CONTRIBUTING.md",
    "wheel/pypi.md": _DOCS.parent / "wheel" / "pypi.md",
}

# Flags to append to the printed ones; the last value of a flag counts.
_SHORT = {
    "train": "--config.trainer.num_steps=3 --config.trainer.eval_batches=1 "
    "--config.logger.sample_tokens=8",
    "evaluate": "--max_batches=1",
    "generate": "--num_tokens=8",
    "benchmark": "--repeats=1",
    "benchmark_context": "--repeats=1 --config.data.context_length=64",
    "benchmark_generation": "--repeats=1 --batch_sizes=1 --prompt_lengths=16",
    "benchmark_slstm": "--repeats=1",
    "benchmark_trainer": "--stretches=1 --config.data.batch_size=1",
    "fuzz": "--cases=3",
    "soak": "--injuries=1",
}
_ROOMS = ("", "benchmarks.", "testing.")


def _blocks():
    """Lists each page with its blocks: the number of their line, their language and their text."""
    pages = []
    for name, path in _PAGES.items():
        text = path.read_text()
        blocks = [
            (text[: found.start()].count("\n") + 1, found[2], textwrap.dedent(found[3]))
            for found in re.finditer(r"^( *)```(\w+)\n(.*?)^\1```$", text, re.M | re.S)
            if found[2] in ("sh", "python")
        ]
        if blocks:
            pages.append((name, blocks))
    return pages


def _module(tool):
    """Returns the name of a tool's module."""
    for room in _ROOMS:
        name = f"xlstm.tools.{room}{tool}"
        if os.path.exists(name.replace(".", os.sep) + ".py"):
            return name
    raise AssertionError(f"there is no tool {tool}")


def _write_bazelw(folder):
    """Writes the stand-in: `run` starts a tool; `build` and `test` are what runs this test."""
    cases = "\n".join(
        f'//xlstm/tools:{tool}) exec {sys.executable} -m {_module(tool)} "$@" {flags} ;;'
        for tool, flags in ({"plot": "", "show_config": "", "describe_step": ""} | _SHORT).items()
    )
    script = folder / "bazelw"
    script.write_text(
        '#!/bin/sh\n[ "$1" = run ] || exit 0\nlabel=$2\nshift 2\n[ $# = 0 ] || shift\n'
        f'case "$label" in\n{cases}\n*) echo "unknown $label" >&2; exit 1 ;;\nesac\n'
    )
    script.chmod(0o755)
    program = folder / "bazel-bin" / "xlstm" / "tools" / "train"  # The output of `build`.
    program.parent.mkdir(parents=True)
    program.write_text(
        '#!/bin/sh\nexec "$(dirname "$0")/../../../bazelw" run //xlstm/tools:train -- "$@"\n'
    )
    program.chmod(0o755)


def _run(folder, *command):
    root = os.getcwd()
    env = {
        "BUILD_WORKING_DIRECTORY": str(folder),
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        "COLUMNS": "120",
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def _missing_package(text):
    """Returns a package that a block imports and this project does not install, or None."""
    names = set(re.findall(r"^(?:import|from) (\w+)", text, re.M))
    return next(iter(names & {"torch", "transformers"}), None)


@pytest.mark.parametrize("page, blocks", _blocks(), ids=lambda x: x if isinstance(x, str) else "")
def test_the_blocks_of_a_page_run_as_printed(tmp_path, page, blocks):
    _write_bazelw(tmp_path)
    (tmp_path / "examples" / "library_user").mkdir(parents=True)
    for line, language, text in blocks:
        block = f"{page}:{line}\n{text}"
        if language == "sh":
            result = _run(tmp_path, "bash", "-euo", "pipefail", "-c", text)
        elif "def get_config(" in text:
            (tmp_path / "mine.py").write_text(text)
            result = _run(
                tmp_path, "./bazelw", "run", "//xlstm/tools:show_config", "--", "--config=mine.py"
            )
        elif _missing_package(text):
            continue
        else:
            devices = "import jax\njax.config.update('jax_num_cpu_devices', 4)\n"
            result = _run(tmp_path, sys.executable, "-c", devices + text)
        assert result.returncode == 0, f"{block}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
