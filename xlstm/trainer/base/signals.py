"""SIGTERM, SIGINT and SIGHUP as a wish: finish what must be finished, then stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

# Whoever sends one of these twice does not want to wait. A terminal that closes sends SIGHUP, and
# the shell in it once more.
_URGENT = (signal.SIGTERM, signal.SIGINT)
_SIGNALS = (*_URGENT, signal.SIGHUP)


@contextlib.contextmanager
def on_stop_signal(ask: Callable[[str], None]) -> Iterator[None]:
    """While inside, the first SIGTERM, SIGINT or SIGHUP asks, and another one does nothing.

    But a second SIGTERM or SIGINT ends the process at once. Signals that are ignored, as `nohup`
    has it, stay so.

    A thread hears of the signals: Python's own handlers wait for the main thread, which may be
    waiting for a device that hangs.

    Args:
        ask: Called with the name of the first signal, in the thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may take signals over.
        return
    numbers = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        asked = is_urgent = False
        while number := os.read(reader, 1):
            if number[0] not in numbers:
                continue
            if number[0] in _URGENT:
                if is_urgent:
                    os._exit(128 + number[0])
                is_urgent = True
            if not asked:
                asked = True
                with contextlib.suppress(Exception):  # It may speak to a terminal that is gone.
                    ask(signal.Signals(number[0]).name)
        os.close(reader)

    # A handler of Python's own, so that the signal is written into the pipe and does nothing else.
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
