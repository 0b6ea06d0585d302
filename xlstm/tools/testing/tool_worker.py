"""Runs one tool repeatedly in one process.

    python -m xlstm.tools.testing.tool_worker MODULE BYTES

Each line of the standard input is a command line, as a JSON list of words. Each line of the output
is a JSON object with the fields of `Answer`.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import resource
import select
import subprocess
import sys
import time
import traceback
from types import ModuleType

from absl import flags, logging
from absl.testing import flagsaver

# How `main` ended: it returned, it rejected its input, or it failed in another way.
ACCEPTED, REJECTED, FAILED = "accepted", "rejected", "failed"


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of running a tool.

    Attributes:
        ending: `ACCEPTED`, `REJECTED` or `FAILED`.
        text: The tool's output, the message of its error, or its traceback.
        seconds: How long it ran.
        num_bytes: By how much the process's peak memory has grown.
    """

    ending: str
    text: str
    seconds: float
    num_bytes: int


def run_main(tool: ModuleType, words: list[str]) -> Answer:
    """Runs the `main` of a tool.

    Args:
        tool: The tool's module.
        words: The tool's command line.

    Returns:
        The result.
    """
    begin, before = time.perf_counter(), _most_memory()
    output = io.StringIO()
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(output):
            flags.FLAGS([tool.__name__, *words])
            tool.main([tool.__name__])
        ending, text = ACCEPTED, output.getvalue()
    except (ValueError, OSError) as error:
        ending, text = REJECTED, str(error)
    except BaseException:
        ending, text = FAILED, traceback.format_exc()
    return Answer(ending, text, time.perf_counter() - begin, _most_memory() - before)


class Worker:
    """A process that runs one tool repeatedly."""

    def __init__(self, tool: str, env: dict[str, str], num_bytes: int):
        """Starts the process.

        Args:
            tool: The tool's module.
            env: Further environment variables.
            num_bytes: How much memory it may allocate beyond what its first run used.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, tool, str(num_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | env,
        )

    def run(self, words: list[str], seconds: float) -> Answer:
        """Runs the tool; it has failed if it exits or does not answer within `seconds`."""
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        if select.select([self._process.stdout], [], [], seconds)[0]:
            line = self._process.stdout.readline()
            if line:
                return Answer(**json.loads(line))
        self.close()
        return Answer(FAILED, f"no answer, status {self._process.returncode}", seconds, 0)

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()


def _most_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limit_memory(num_bytes: int) -> None:
    """Makes allocations fail that would grow this process by more than `num_bytes`."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, size + num_bytes))


def main() -> None:
    """Answers each line of the standard input."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.set_verbosity(logging.FATAL)
    tool, most = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    for number, line in enumerate(sys.stdin):
        print(json.dumps(dataclasses.asdict(run_main(tool, json.loads(line)))), file=answers)
        answers.flush()
        if number == 0:  # The first run has allocated what stays, such as threads.
            _limit_memory(most)


if __name__ == "__main__":
    main()
