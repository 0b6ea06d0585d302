"""Small changes to files, most of which make them invalid, for fuzzing."""

import json
import math
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# Values that replace others.
_STRANGE = [
    *(None, True, False, -1, 0, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf),
    *(10**6, 10**9, 10**12, 2**63, -(10**20), 10**400),
    *("", "x", "3", "\x1b[2J", "\u202eabc", "../secret", "/etc", "a\0b", "\ud800", "٣", "1e3"),
    *([], [1], [None], ["x"], [[0]], {}, {"a": 1}, {"content": 3}),
]
_DEPTH = 100_000  # More than any parser follows.


def mutate_json(rng: random.Random, content: bytes) -> tuple[bytes, str, bool]:
    """Changes a JSON object.

    Args:
        rng: Chooses the change.
        content: The object.

    Returns:
        The changed text, a description of the change, and whether the meaning is unchanged.
    """
    fields = json.loads(content)
    operation = rng.choice(
        ["spaces", "order", "removed", "twice", "deep", "long", "cut", "flip", "mark", "bytes"]
        + ["value"] * 12
    )
    if operation == "spaces":
        return json.dumps(fields, indent=rng.randint(0, 9)).encode(), operation, True
    if operation == "order":
        return json.dumps(dict(reversed(fields.items()))).encode(), operation, True
    if operation in ("cut", "flip"):
        return *mutate_bytes(rng, content, operation), False
    if operation == "mark":
        return b"\xef\xbb\xbf" + content, "a byte order mark", False
    if operation == "bytes":
        offset = rng.randrange(len(content))
        return content[:offset] + b"\xff" + content[offset:], f"no UTF-8 at {offset}", False
    holder, key, path = rng.choice(list(_entries(fields)))
    if operation == "removed":
        del holder[key]
        return json.dumps(fields).encode(), f"without {path}", False
    if operation == "twice":
        first = next(iter(fields))
        text = json.dumps({first: rng.choice(_STRANGE)})[:-1] + ", " + json.dumps(fields)[1:]
        return text.encode(), f"{first} twice", False
    marker = "placeholder of the value"
    value = rng.choice(_STRANGE) if operation == "value" else marker
    holder[key] = value
    text = json.dumps(fields)
    if operation == "deep":
        text = text.replace(json.dumps(marker), "[" * _DEPTH + "]" * _DEPTH)
    elif operation == "long":
        text = text.replace(json.dumps(marker), "9" * rng.choice([400, 6000]))
    shown = repr(value)[:40] if operation == "value" else operation
    return text.encode(), f"{path}={shown}", False


def _entries(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yields every value in nested objects and lists as its container, key and path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        name = f"{path}.{key}" if path else str(key)
        yield value, key, name
        if isinstance(inner, dict | list):
            yield from _entries(inner, name)


def mutate_bytes(rng: random.Random, content: bytes, operation: str) -> tuple[bytes, str]:
    """Truncates a file (`cut`) or flips a bit of it (`flip`); returns it with a description."""
    offset = rng.randrange(len(content))
    if operation == "cut":
        return content[:offset], f"cut off at {offset}"
    changed = bytearray(content)
    changed[offset] ^= 1 << rng.randrange(8)
    return bytes(changed), f"a bit flipped at {offset}"


def mutate_header(rng: random.Random, content: bytes) -> tuple[bytes, str, bool]:
    """Changes the header of a safetensors file or the header's length; see `mutate_json`."""
    (size,) = struct.unpack("<Q", content[:8])
    header, rest = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.2:
        wrong = rng.choice([0, 1, size - 1, size + 1, len(content), 10**8, 2**63, 2**64 - 1])
        return struct.pack("<Q", wrong) + content[8:], f"a header of {wrong} bytes", False
    changed, what, is_same = mutate_json(rng, header)
    changed += b" " * (-len(changed) % 8)
    return struct.pack("<Q", len(changed)) + changed + rest, f"header: {what}", is_same


def mutate_arrays(rng: random.Random, path: str) -> tuple[str, bool]:
    """Changes an .npz file in place; returns a description, and whether it means the same."""
    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    number = array.dtype.kind in "bif"

    def poisoned() -> np.ndarray:
        return np.full_like(array, math.nan) if array.dtype.kind == "f" else array.astype("S99")

    changes: dict[str, Callable[[], np.ndarray]] = {
        "larger": lambda: np.concatenate([np.atleast_1d(array)] * 2),
        "empty": lambda: array.reshape(-1)[:0],
        "a scalar": lambda: np.zeros((), array.dtype),
        "wide": lambda: np.expand_dims(array, 0),
        "text": lambda: np.array(rng.choice(["", "[", "[[1]]", "x\x1b[2J", "[" * _DEPTH])),
        "complex": lambda: array.astype(complex) if number else np.zeros(3, complex),
        "poisoned": poisoned,
    }
    what = rng.choice(["order", "removed", "added", "compressed", *changes])
    if what == "removed":
        del arrays[name]
    elif what == "added":
        arrays["more"] = array
    elif what in changes:
        arrays[name] = changes[what]()
    if what == "order":
        arrays = dict(reversed(arrays.items()))
    write = np.savez_compressed if what == "compressed" else np.savez
    with open(path, "wb") as file:
        write(file, **arrays)
    return what if what in ("order", "compressed") else f"{name}: {what}", what == "order"


def move_behind_link(path: str, target: str) -> None:
    """Moves a file and leaves a link in its place."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    os.rename(path, target)
    os.symlink(os.path.relpath(target, os.path.dirname(path)), path)
