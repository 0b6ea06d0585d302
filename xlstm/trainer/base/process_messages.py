"""Text that processes tell each other outside of computations.

It goes through the key-value store of JAX's coordinator, the first process. So it arrives where a
computation would hang, since the processes differ, and before any device is looked at.
"""

import jax

# The store has no public interface; Orbax reaches it in the same way.
from jax._src.distributed import global_state


def num_processes() -> int:
    """The number of connected processes; unlike `jax.process_count` it opens no devices."""
    return global_state.num_processes


def process_id() -> int:
    """The number of this process, from 0; unlike `jax.process_index` it opens no devices."""
    return global_state.process_id


def tell(topic: str, text: str) -> None:
    """Tells all processes a text; a later one on the same topic replaces it.

    Args:
        topic: What it is about.
        text: The text.
    """
    global_state.client.key_value_set(_key(topic, process_id()), text, allow_overwrite=True)


def told_by_all(topic: str) -> dict[int, str]:
    """Returns what the processes have told on a topic so far, by their numbers."""
    pairs = global_state.client.key_value_dir_get(f"xlstm/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in pairs}


def told_by(topic: str, process: int) -> str:
    """Returns what one process has told on a topic; raises JaxRuntimeError if it has not."""
    return global_state.client.key_value_try_get(_key(topic, process))


def wait_until_told(topic: str, seconds: float) -> None:
    """Waits until all processes are here.

    Args:
        topic: What they have told before; a topic serves once.
        seconds: How long to wait.

    Raises:
        OSError: If some do not come.
    """
    try:
        global_state.client.wait_at_barrier(f"xlstm/{topic}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        missing = sorted(set(range(num_processes())) - told_by_all(topic).keys())
        raise OSError(
            f"waited {seconds:.0f} s in vain for processes {missing} of {num_processes()} ({error})"
        ) from error


def _key(topic: str, process: int) -> str:
    return f"xlstm/{topic}/{process}"
