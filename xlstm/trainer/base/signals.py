"""SIGTERM and SIGINT as a wish: finish what must be finished, then stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextlib.contextmanager
def on_stop_signal(ask: Callable[[str], None]) -> Iterator[None]:
    """While inside, the first SIGTERM or SIGINT asks, and a second one ends the process at once.

    A thread hears of the signals: Python's own handlers wait for the main thread, which may be
    waiting for a device that hangs.

    Args:
        ask: Called with the name of the first signal, in the thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may take signals over.
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        asked = False
        while number := os.read(reader, 1):
            if number[0] not in _SIGNALS:
                continue
            if asked:
                os._exit(128 + number[0])
            asked = True
            with contextlib.suppress(Exception):  # It may speak to a terminal that is gone.
                ask(signal.Signals(number[0]).name)
        os.close(reader)

    # A handler of Python's own, so that the signal is written into the pipe and does nothing else.
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
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
