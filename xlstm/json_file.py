"""Reads JSON objects that anyone may have written: whatever is wrong with one is a ValueError."""

import json
from typing import Any

from xlstm.inner_file import read_file
from xlstm.visible_text import short_repr


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        ValueError: If there is no such file, it cannot be read, or `parse_json` refuses it.
    """
    try:
        content = read_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return parse_json(content, path)


def parse_json(content: str | bytes, name: str, *, strict: bool = False) -> dict[str, Any]:
    """Parses a JSON object, in which no object names a field twice.

    Args:
        content: The text, or its UTF-8.
        name: What to call it in an error.
        strict: Whether to refuse NaN and Infinity, which Python writes and JSON does not know.

    Returns:
        The object.

    Raises:
        ValueError: If it is none, or is nested or written in a way that cannot be read.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        found = json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant if strict else float,
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} cannot be read: it is not UTF-8 ({error})") from None
    except RecursionError:
        raise ValueError(f"{name} cannot be read: it is nested too deeply") from None
    except ValueError as error:  # Not JSON; or a number of thousands of digits.
        raise ValueError(f"{name} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"it holds {constant}, which JSON does not know")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of its fields; of two with one name, one would be lost."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {short_repr(twice)} is there twice")
    return fields
