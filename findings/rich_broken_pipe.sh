#!/bin/sh
# A console of rich whose reader is gone ends the program and silences stdout.
#
# Expected: printing to a closed pipe raises BrokenPipeError, as `print` does: an Exception that `except
#   OSError` catches, and that concerns this one file. What goes to stdout later arrives.
# What happens: the console raises SystemExit(1), which `except Exception` does not catch, and connects
#   stdout to /dev/null for good. It does so even if it writes to stderr and stdout has a reader, so
#   that all that the program prints afterwards, its result too, is lost.
# Version: rich 15.0.0.
# Decided in: rich/console.py, Console.on_broken_pipe (replaces `sys.stdout` whatever its own file is).
#
# Output:
#   stderr closed, print: BrokenPipeError, stdout gets 'the result\n'
#   stderr closed, Console.print: SystemExit, stdout gets ''
set -eu
script=$(realpath "$0")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet rich==15.0.0 >/dev/null 2>&1
cat > finding.py <<'PYTHON'
import os
import subprocess
import sys

PROGRAM = """
import sys
from rich.console import Console

raised = "nothing"
try:
    if sys.argv[1] == "print":
        print("progress", file=sys.stderr)
    else:
        Console(stderr=True).print("progress")
except BaseException as error:
    raised = type(error).__name__
with open("raised.txt", "w") as file:
    file.write(raised)
print("the result")
"""
reader, closed = os.pipe()
os.close(reader)
for name in ("print", "Console.print"):
    command = [sys.executable, "-c", PROGRAM, name]
    child = subprocess.run(command, stderr=closed, stdout=subprocess.PIPE, text=True)
    with open("raised.txt") as file:
        print(f"stderr closed, {name}: {file.read()}, stdout gets {child.stdout!r}")
PYTHON
venv/bin/python finding.py | tee found.txt
sed '/^# Output:$/,/^set /!d; s/^#   //; t; d' "$script" > expected.txt
cmp expected.txt found.txt
