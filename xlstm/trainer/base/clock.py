"""What the time of a run is spent on, and a watchdog for when it stands still."""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

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


_LOOKS_PER_STALL = 20


@contextlib.contextmanager
def watchdog(clock: Clock, stall_seconds: float, report: Callable[[str], None]) -> Iterator[None]:
    """While inside, a thread reports when the run's clock has not moved for a while.

    It reports once a stall, names the phase, and shows where the calling thread is. It does not end
    the run: storage and networks come back.

    Args:
        clock: The run's clock.
        stall_seconds: How long a phase may go on; 0: for ever.
        report: Takes the text.
    """
    if not stall_seconds:
        yield
        return
    watched, done = threading.get_ident(), threading.Event()

    def watch() -> None:
        reported = False
        while not done.wait(stall_seconds / _LOOKS_PER_STALL):
            phase, seconds = clock.current()
            if seconds < stall_seconds:
                reported = False
            elif not reported:
                reported = True
                stack = "".join(traceback.format_stack(sys._current_frames()[watched]))
                report(f"no progress for {seconds:.0f} s, in the phase {phase!r}:\n{stack}")

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
