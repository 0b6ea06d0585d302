"""What processes must agree on, told through JAX's coordinator."""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src.distributed import global_state

# The store has no public interface; Orbax reaches it in the same way.


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


# What to do about a difference -> name of a fact -> its value, which JSON can hold.
Facts = Mapping[str, Mapping[str, Any]]

_TIMEOUT = 2 * 60 * 60  # Seconds; to look at large data takes its time.
_uses = collections.Counter()


def check_agreement(topic: str, make_facts: Callable[[], Facts]) -> None:
    """Checks that facts are the same in all processes, which must all call this.

    Only digests travel between processes that agree.

    Args:
        topic: What the facts are about.
        make_facts: Makes the facts of this process, the most telling first; not called if it is the
            only one.

    Raises:
        ValueError: In every process, if one differs from the first; it names the first difference.
        OSError: If a process does not come.
    """
    if num_processes() == 1:
        return
    _uses[topic] += 1  # A run may be opened several times in a process.
    topic = f"{topic}_{_uses[topic]}"
    content = json.dumps(make_facts())
    tell(f"{topic}_content", content)
    tell(topic, hashlib.sha256(content.encode()).hexdigest())
    wait_until_told(topic, _TIMEOUT)
    digests = told_by_all(topic)
    other = next((process for process in sorted(digests) if digests[process] != digests[0]), None)
    if other is not None:
        first, others = (json.loads(told_by(f"{topic}_content", process)) for process in (0, other))
        raise ValueError(describe_difference(first, others, other))


def describe_difference(first: Facts, others: Facts, process: int) -> str:
    """Names the first difference between the facts of two processes.

    Args:
        first: The facts of process 0.
        others: Those of another process, which differ.
        process: Its number.

    Returns:
        A sentence with both values and what to do.
    """
    for remedy in [*first, *others]:
        ours, theirs = first.get(remedy, {}), others.get(remedy, {})
        for name in [*ours, *theirs]:
            if name not in ours or name not in theirs or ours[name] != theirs[name]:
                values = _name_value(name, theirs), _name_value(name, ours)
                return f"process {process} has {values[0]}, process 0 has {values[1]}: {remedy}"
    return f"process {process} describes itself in another order than process 0"


def _name_value(name: str, facts: Mapping[str, Any]) -> str:
    return f"{name}={facts[name]!r}" if name in facts else f"no {name}"
