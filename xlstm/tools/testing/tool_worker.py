"""Runs one tool again and again, in one process: `python -m xlstm.tools.tool_worker MODULE BYTES`.

Each line of the standard input is a command line, as a JSON list of words; each line of the answer
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

# How a main ended: it returned, it refused its input, or it failed in another way.
ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a tool answered.

    Attributes:
        ending: `ACCEPTED`, `REFUSED` or `FAILED`.
        text: What it printed; or the message of the error, or the traceback.
        seconds: How long it took.
        num_bytes: By how much the most memory that the process ever had has grown.
    """

    ending: str
    text: str
    seconds: float
    num_bytes: int


def run_main(tool: ModuleType, words: list[str]) -> Answer:
    """Runs the main of a tool.

    Args:
        tool: Its module.
        words: Its command line.

    Returns:
        What it answered.
    """
    begin, before = time.perf_counter(), _most_memory()
    output = io.StringIO()
    try:
        with flagsaver.flagsaver(), contextlib.redirect_stdout(output):
            flags.FLAGS([tool.__name__, *words])
            tool.main([tool.__name__])
        ending, text = ACCEPTED, output.getvalue()
    except (ValueError, OSError) as error:
        ending, text = REFUSED, str(error)
    except BaseException:
        ending, text = FAILED, traceback.format_exc()
    return Answer(ending, text, time.perf_counter() - begin, _most_memory() - before)


class Worker:
    """A process that runs one tool again and again."""

    def __init__(self, tool: str, env: dict[str, str], num_bytes: int):
        """Starts it.

        Args:
            tool: The tool's module.
            env: Further environment variables.
            num_bytes: So much memory it may take beyond what its first run has taken.
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
        """Runs the tool; one that is silent for so long, or dies, has failed."""
        self._process.stdin.write(json.dumps(words) + "\n")
        self._process.stdin.flush()
        if select.select([self._process.stdout], [], [], seconds)[0]:
            line = self._process.stdout.readline()
            if line:
                return Answer(**json.loads(line))
        self.close()
        return Answer(FAILED, f"no answer, status {self._process.returncode}", seconds, 0)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()


def _most_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limit_memory(num_bytes: int) -> None:
    """Makes an allocation fail that would make this process so much larger than it is."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + num_bytes, size + num_bytes))


def main() -> None:
    """Answers until there are no more lines."""
    # Whatever libraries print must not be among the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.set_verbosity(logging.FATAL)
    tool, most = importlib.import_module(sys.argv[1]), int(sys.argv[2])
    for number, line in enumerate(sys.stdin):
        print(json.dumps(dataclasses.asdict(run_main(tool, json.loads(line)))), file=answers)
        answers.flush()
        if number == 0:  # What a first run needs, such as threads, is there.
            _limit_memory(most)


if __name__ == "__main__":
    main()
