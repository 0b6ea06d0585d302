"""Escaping of untrusted text, so that a terminal can show it."""

import re
import reprlib
from typing import Any

# Control characters (C0 and C1) move the cursor, change colors and titles, or send input to the
# shell. Direction controls make text look like other text. A lone surrogate cannot be written.
_UNSEEN = "\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_A_LINE = re.compile(f"[{_UNSEEN}\u2028\u2029]")
_SHORT = reprlib.Repr()
_SHORT.maxlong, _SHORT.maxstring, _SHORT.maxother = 40, 80, 80
_IN_LINES = re.compile(f"(?![\n\t])[{_UNSEEN}]")


def visible(text: str) -> str:
    r"""Returns a text as one line, with control characters escaped, such as `\x1b`."""
    return _IN_A_LINE.sub(_escape, text)


def visible_lines(text: str) -> str:
    r"""Returns a text with control characters escaped, except `\n` and `\t`."""
    return _IN_LINES.sub(_escape, text)


def short_repr(value: Any) -> str:
    """Returns the `repr` of a value as one line of bounded length, for messages."""
    return visible(_SHORT.repr(value))


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
