"""Says where a run hangs."""

import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator

from xlstm.trainer.base.clock import Clock

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
