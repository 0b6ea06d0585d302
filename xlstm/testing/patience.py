"""How long a test waits for something that must happen."""

import subprocess
import time
from collections.abc import Callable

# Seconds. Only something that hangs takes this long, even on a machine many times slower than ours.
PATIENCE = 900


def wait_until(
    condition: Callable[[], object],
    process: subprocess.Popen | None = None,
    *,
    interval: float = 0.01,
) -> None:
    """Waits until a condition holds.

    Args:
        condition: Returns whether it holds.
        process: A process that must not end before.
        interval: Seconds between two looks.

    Raises:
        TimeoutError: If the condition does not hold after `PATIENCE` seconds.
        ChildProcessError: If the process ends.
    """
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process and process.poll() is not None:
            raise ChildProcessError(f"the process ended with status {process.returncode}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition does not hold after {PATIENCE} s")
        time.sleep(interval)
