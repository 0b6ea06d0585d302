"""All processes of a run must be alike: what they are is compared before they compute together."""

import collections
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from xlstm.trainer.base import process_messages

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
    if process_messages.num_processes() == 1:
        return
    _uses[topic] += 1  # A run may be opened several times in a process.
    topic = f"{topic}_{_uses[topic]}"
    content = json.dumps(make_facts())
    process_messages.tell(f"{topic}_content", content)
    process_messages.tell(topic, hashlib.sha256(content.encode()).hexdigest())
    process_messages.wait_until_told(topic, _TIMEOUT)
    digests = process_messages.told_by_all(topic)
    other = next((process for process in sorted(digests) if digests[process] != digests[0]), None)
    if other is not None:
        first, others = (
            json.loads(process_messages.told_by(f"{topic}_content", process))
            for process in (0, other)
        )
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
