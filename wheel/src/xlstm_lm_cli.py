"""The command `xlstm-lm`: starts the tools of an installed wheel.

It is not a part of `xlstm_lm`, because that module raises where the command prints a line.
"""

import ast
import difflib
import importlib.util
import os
import platform
import runpy
import sys
from importlib.metadata import version

# The tools by their folder. Their own modules say what they do.
_FOLDERS = {
    "xlstm.tools": (
        "train",
        "prepare_data",
        "generate",
        "evaluate",
        "convert",
        "plot",
        "show_config",
        "describe_step",
    ),
    "xlstm.tools.benchmarks": (
        "benchmark",
        "benchmark_context",
        "benchmark_generation",
        "benchmark_slstm",
        "benchmark_trainer",
        "kernel_report",
    ),
}
_TOOLS = {tool: f"{folder}.{tool}" for folder, tools in _FOLDERS.items() for tool in tools}
# The module is not called like the package that it imports.
_TOOLS["lm_eval"] = "xlstm.tools.harness.lm_eval_command"
# See `huge_pages.bzl`. The C library reads it when a process starts.
_HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def _help() -> str:
    lines = ["usage: xlstm-lm TOOL [FLAGS]", "", "tools (`xlstm-lm TOOL --help` lists the flags):"]
    for tool, module in _TOOLS.items():
        # Importing a tool takes seconds.
        with open(importlib.util.find_spec(module).origin, encoding="utf-8") as file:
            docstring = ast.get_docstring(ast.parse(file.read()))
        lines.append(f"  {tool:<22}{docstring.splitlines()[0]}")
    return "\n".join(lines)


def _version() -> str:
    from xlstm.installation import VERSION, commit

    python, jax = platform.python_version(), version("jax")
    return f"xlstm-lm {VERSION} (commit {commit()}), Python {python}, jax {jax}"


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Starts the tool that the command line names."""
    try:
        import xlstm_lm  # noqa: F401  Checks whose `xlstm` this is.
    except ImportError as error:
        _fail(str(error))
    tool = sys.argv[1] if sys.argv[1:] else "--help"
    if tool in ("--help", "-h", "help"):
        print(_help())
    elif tool == "--version":
        print(_version())
    elif tool not in _TOOLS:
        near = difflib.get_close_matches(tool, _TOOLS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(_TOOLS)}"
        _fail(f"xlstm-lm has no tool {tool!r}; {hint}")
    elif sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        words = [sys.executable, "-P", "-m", "xlstm_lm_cli", *sys.argv[1:]]
        os.execve(sys.executable, words, os.environ | _HUGE_PAGES)
    else:
        del sys.argv[1]
        runpy.run_module(_TOOLS[tool], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
