"""What a run spends its time on."""

import contextlib
import time
from collections.abc import Iterator

# What is not training: speeds leave it out.
PAUSES = ("start", "compile", "evaluation", "checkpoint")


class Clock:
    """Adds up the time of each phase of a run.

    Phases: `start` until the first other one, `data` (waiting for a batch), `compile`, `step`
    (starting a step, waiting for metrics), `evaluation`, `checkpoint`, and `other`.
    """

    def __init__(self):
        """Starts the clock."""
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "start", time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside for a phase; of phases in each other, for the inner one."""
        outer = "other" if self._phase == "start" else self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def tick(self) -> None:
        """Says that a phase that takes its time has not come to a halt."""
        self._enter(self._phase)

    def current(self) -> tuple[str, float]:
        """The phase, and how many seconds ago anything was heard of the run; from any thread."""
        return self._phase, time.perf_counter() - self._since

    def seconds(self) -> dict[str, float]:
        """The seconds of each phase so far."""
        self.tick()
        return dict(self._seconds)

    def training_seconds(self) -> float:
        """The seconds so far that were no pause."""
        return sum(seconds for phase, seconds in self.seconds().items() if phase not in PAUSES)

    def goodput(self) -> float:
        """The share of the time so far in which steps were computed."""
        seconds = self.seconds()
        return seconds.get("step", 0.0) / max(sum(seconds.values()), 1e-9)
