"""SIGTERM, SIGINT and SIGHUP as requests to finish the current work and stop."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

# A second one of these ends the process at once. SIGHUP is not among them: when a terminal closes,
# the kernel and the shell both send it.
_URGENT = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_URGENT, signal.SIGHUP)
# A SIGTERM this soon after another signal belongs to it: SLURM's controller and its srun both send
# one to a job that is preempted or cancelled, a few milliseconds apart.
_SECONDS_OF_ONE_REQUEST = 1.0


@contextlib.contextmanager
def on_stop_signal(ask: Callable[[str], None]) -> Iterator[None]:
    """Calls a function at the first SIGTERM, SIGINT or SIGHUP during the block.

    Later ones do nothing, except that a second SIGTERM or SIGINT ends the process at once. A
    SIGTERM within a second of the first one is not a second one. Signals that are ignored, as under
    `nohup`, stay ignored.

    A thread receives the signals, because Python's own handlers wait for the main thread, which may
    be waiting for a device that hangs.

    Args:
        ask: Called with the name of the first signal, in the thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may install handlers.
        return
    numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        asked, urgent_since = False, None
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if number[0] in _URGENT:
                now = time.monotonic()
                if urgent_since is None:
                    urgent_since = now
                elif number[0] != signal.SIGTERM or now - urgent_since > _SECONDS_OF_ONE_REQUEST:
                    os._exit(128 + number[0])
            if not asked:
                asked = True
                with contextlib.suppress(Exception):  # It may print to a closed terminal.
                    ask(signal.Signals(number[0]).name)
        os.close(reader)

    # With a Python handler the signal is written into the pipe and does nothing else.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    descriptor_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)
        thread.join()


def stop_message(signal_name: str, activity: str, seconds: float) -> str:
    """Returns what to tell the user when a signal asks a run to stop.

    Args:
        signal_name: The signal's name, such as "SIGINT".
        activity: What the run is doing, as `Clock.activity` says it.
        seconds: For how long it has been doing so.
    """
    again = {"SIGINT": "press Ctrl-C again", "SIGTERM": "send SIGTERM again"}
    twice = "send SIGTERM twice"  # The first one does not count yet.
    return (
        f"{signal_name} received: the run saves a checkpoint within a few steps and stops"
        f" (now {activity}, {seconds:.0f} s so far);"
        f" {again.get(signal_name, twice)} to stop at once without a checkpoint"
    )
