"""A clock of a run's phases, and threads that report what a run waits for and when it stalls."""

import contextlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

# Phases that are not training; speeds leave them out.
PAUSES = ("start", "compile", "evaluation", "checkpoint", "end")

# What a phase does, as `Clock.activity` says it.
_ACTIVITIES = {
    "start": "preparing the run",
    "data": "waiting for a batch",
    "compile": "compiling the training step",
    "step": "computing a step",
    "evaluation": "evaluating",
    "checkpoint": "reading or writing a checkpoint",
    "other": "preparing the next step",
    "end": "writing the last files",
}
# An evaluation compiles before its first batch.
_FIRST_EVALUATION = "compiling the evaluation step"


class Clock:
    """The time that a run spends in each of its phases.

    Phases: `start` until the first other one, `data` (waiting for a batch), `compile`, `step`
    (starting a step, waiting for metrics), `evaluation`, `checkpoint`, `other`, and `end` (closing
    files after the last step).
    """

    def __init__(self):
        """Starts the clock."""
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "start", time.perf_counter()
        self._entered = self._since
        self._has_evaluated = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside for a phase; of nested phases, for the innermost one."""
        outer = "other" if self._phase == "start" else self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(outer)

    def _enter(self, name: str) -> None:
        # The phase comes last: a thread that sees the new phase then sees its beginning, too.
        self._entered = time.perf_counter()
        self._record(name)

    def _record(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now

    def finish(self) -> None:
        """Enters the phase `end`."""
        self._enter("end")

    def tick(self) -> None:
        """Notes that the current phase makes progress."""
        self._has_evaluated |= self._phase == "evaluation"
        self._record(self._phase)

    def current(self) -> tuple[str, float]:
        """Returns the phase and the seconds since its last sign of progress; from any thread."""
        return self._phase, time.perf_counter() - self._since

    def activity(self) -> tuple[str, float]:
        """Returns what the run does, in words, and for how many seconds; from any thread."""
        text = _ACTIVITIES[self._phase]
        if self._phase == "evaluation" and not self._has_evaluated:
            text = _FIRST_EVALUATION
        return text, time.perf_counter() - self._entered

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each phase so far."""
        self._record(self._phase)
        return dict(self._seconds)

    def training_seconds(self) -> float:
        """Returns the seconds so far that are not a pause."""
        return sum(seconds for phase, seconds in self.seconds().items() if phase not in PAUSES)

    def goodput(self) -> float:
        """Returns the share of the time so far in which steps are computed."""
        seconds = self.seconds()
        return seconds.get("step", 0.0) / max(sum(seconds.values()), 1e-9)


# Seconds after which a wait is reported, each once; then again after each last interval.
_REPORT_AFTER = {
    _ACTIVITIES["start"]: (5.0, 30.0, 60.0),
    _ACTIVITIES["compile"]: (1.0, 10.0, 30.0, 60.0),
    _FIRST_EVALUATION: (1.0, 10.0, 30.0, 60.0),
    _ACTIVITIES["checkpoint"]: (5.0, 30.0, 60.0),
    _ACTIVITIES["other"]: (5.0, 30.0, 60.0),
    _ACTIVITIES["end"]: (2.0, 10.0, 30.0, 60.0),
}
_SECONDS_BETWEEN_LOOKS = 0.2


@contextlib.contextmanager
def report_waits(clock: Clock, report: Callable[[str], None]) -> Iterator[None]:
    """Reports during the block what the run waits for, so that it does not look hung.

    A thread reports compilations, checkpoints and the preparation of the run when they take long,
    and how long they have taken so far.

    Args:
        clock: The run's clock.
        report: Called with each line, in the thread.
    """
    done = threading.Event()

    def watch() -> None:
        last_text, last_seconds, reports = "", 0.0, 0
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            text, seconds = clock.activity()
            if text != last_text or seconds < last_seconds:
                reports = 0
            last_text, last_seconds = text, seconds
            after = _REPORT_AFTER.get(text)
            if after and seconds >= _report_time(after, reports):
                while seconds >= _report_time(after, reports):
                    reports += 1
                report(f"{text}: {seconds:.0f} s so far")

    with in_thread("waits", watch, done):
        yield


def _report_time(after: tuple[float, ...], number: int) -> float:
    """Returns the seconds after which a report is due if `number` reports have been made."""
    extra = max(number - len(after) + 1, 0)
    return after[min(number, len(after) - 1)] + extra * after[-1]


@contextlib.contextmanager
def in_thread(name: str, watch: Callable[[], None], done: threading.Event) -> Iterator[None]:
    """Runs `watch` in a thread during the block; it must return when `done` is set."""
    thread = threading.Thread(target=watch, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


_LOOKS_PER_STALL = 20


@contextlib.contextmanager
def watchdog(clock: Clock, stall_seconds: float, report: Callable[[str], None]) -> Iterator[None]:
    """Reports during the block when the run's clock has not moved for a while.

    A thread reports each stall once, with the phase and the stack of the calling thread. It does
    not end the run, because storage and networks may recover.

    Args:
        clock: The run's clock.
        stall_seconds: Seconds without progress that count as a stall; 0 disables the watchdog.
        report: Called with the text, in the thread.
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

    with in_thread("watchdog", watch, done):
        yield
