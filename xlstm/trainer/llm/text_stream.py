"""Turns token ids into text while they are written."""

from collections.abc import Sequence

from xlstm.dataset.tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # Bytes in UTF-8, and so tokens at most.
_CONTEXT = 16  # Ids before the new ones that may decide how their text begins.
_NO_CHARACTER = "\ufffd"


class TextStream:
    """The text of one row, piece by piece, up to a stop string.

    Attributes:
        is_stopped: Whether a stop string has been found; what follows it is ignored.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: Sequence[str]):
        """Begins behind a prompt.

        Args:
            tokenizer: Turns ids into text.
            prompt: Ids in front of the text, which may decide how it begins.
            stops: Strings that end the text and do not belong to it.
        """
        self._tokenizer, self._stops = tokenizer, stops
        # The last ids whose text is known, that text, then the ids since; one after the other they
        # may say something else than each alone.
        self._known, self._new = list(prompt[-_CONTEXT:]), []
        # A character that the prompt ends within belongs to what follows.
        self._known_text = tokenizer.decode(self._known).rstrip(_NO_CHARACTER)
        self._held = ""  # What may be the beginning of a stop string.
        self.is_stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """Takes the next ids, and returns the text that is certain by now."""
        self._new += ids
        whole = len(self._new)
        # A character at the end may still lack bytes; what lacks more than three never was one.
        for end in range(whole, max(whole - _LONGEST_CHARACTER, -1), -1):
            if not self._text_of(end).endswith(_NO_CHARACTER):
                whole = end
                break
        text = self._text_of(whole)
        if whole:
            self._known = (self._known + self._new[:whole])[-_CONTEXT:]
            self._known_text = self._tokenizer.decode(self._known)
            self._new = self._new[whole:]
        return self._up_to_stop(text)

    def finish(self) -> str:
        """Returns the rest of the text."""
        rest = self._up_to_stop(self._text_of(len(self._new)))
        rest += "" if self.is_stopped else self._held
        self._new, self._held = [], ""
        return rest

    def _text_of(self, size: int) -> str:
        """The text of the first so many of the new ids."""
        text = self._tokenizer.decode(self._known + self._new[:size])
        return text[len(self._known_text) :]

    def _up_to_stop(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of a text may be the first ones of a stop string."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
