"""Agreement between processes through JAX's coordinator, before any device is opened."""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

# The key-value store has no public interface; Orbax uses it in the same way.
from jax._src.distributed import global_state

# Remedy for a difference -> name of a fact -> its value, which JSON can represent.
Facts = Mapping[str, Mapping[str, Any]]

_TIMEOUT = 2 * 60 * 60  # Seconds; reading large data takes long.
_uses = collections.Counter()


def num_processes() -> int:
    """Returns the number of connected processes; opens no devices, unlike `jax.process_count`."""
    return global_state.num_processes


def process_id() -> int:
    """Returns the index of this process; opens no devices, unlike `jax.process_index`."""
    return global_state.process_id


def publish(topic: str, text: str) -> None:
    """Publishes a text to all processes; replaces this process's earlier text on the topic.

    Args:
        topic: Name under which the other processes find it.
        text: The text.
    """
    global_state.client.key_value_set(_key(topic, process_id()), text, allow_overwrite=True)


def published_by_all(topic: str) -> dict[int, str]:
    """Returns the texts published on a topic so far, by process index."""
    pairs = global_state.client.key_value_dir_get(f"xlstm/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in pairs}


def published_by(topic: str, process: int) -> str:
    """Returns the text that a process published; raises JaxRuntimeError if there is none."""
    return global_state.client.key_value_try_get(_key(topic, process))


def wait_until_published(topic: str, seconds: float) -> None:
    """Waits until all processes have called this.

    Args:
        topic: The topic on which each process published before; it can be waited for once.
        seconds: How long to wait.

    Raises:
        OSError: If a process does not call this in time.
    """
    try:
        global_state.client.wait_at_barrier(f"xlstm/{topic}", int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        missing = sorted(set(range(num_processes())) - published_by_all(topic).keys())
        raise OSError(
            f"processes {missing} of {num_processes()} did not answer within {seconds:.0f} s"
            f" ({error})"
        ) from error


def _key(topic: str, process: int) -> str:
    return f"xlstm/{topic}/{process}"


def check_agreement(topic: str, make_facts: Callable[[], Facts]) -> None:
    """Checks that facts are the same in all processes, which must all call this.

    Processes that agree exchange only digests.

    Args:
        topic: What the facts are about.
        make_facts: Returns the facts of this process, the most informative ones first; not called
            if there is only one process.

    Raises:
        ValueError: In every process, if one differs from process 0; names the first difference.
        OSError: If a process does not answer.
    """
    if num_processes() == 1:
        return
    _uses[topic] += 1  # A process may open several runs.
    topic = f"{topic}_{_uses[topic]}"
    content = json.dumps(make_facts())
    publish(f"{topic}_content", content)
    publish(topic, hashlib.sha256(content.encode()).hexdigest())
    wait_until_published(topic, _TIMEOUT)
    digests = published_by_all(topic)
    other = next((process for process in sorted(digests) if digests[process] != digests[0]), None)
    if other is not None:
        contents = (published_by(f"{topic}_content", process) for process in (0, other))
        raise ValueError(describe_difference(*map(json.loads, contents), other))


def describe_difference(first: Facts, other: Facts, process: int) -> str:
    """Describes the first difference between the facts of two processes.

    Args:
        first: The facts of process 0.
        other: The facts of another process, which differ.
        process: Index of the other process.

    Returns:
        A sentence with both values and the remedy.
    """
    for remedy in [*first, *other]:
        ours, theirs = first.get(remedy, {}), other.get(remedy, {})
        for name in [*ours, *theirs]:
            if name not in ours or name not in theirs or ours[name] != theirs[name]:
                values = _name_value(name, theirs), _name_value(name, ours)
                return f"process {process} has {values[0]}, process 0 has {values[1]}: {remedy}"
    return f"process {process} lists its facts in another order than process 0"


def _name_value(name: str, facts: Mapping[str, Any]) -> str:
    return f"{name}={facts[name]!r}" if name in facts else f"no {name}"
