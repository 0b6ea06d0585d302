"""Turns token ids into text while they are written, up to a stop string."""

from collections.abc import Sequence

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.dataset.tokenizer import Tokenizer


class TextStream:
    """The text of one row, piece by piece.

    With the text of the prompt it is what the tokenizer decodes all ids to. A character that the
    prompt ends within belongs to the stream.

    Attributes:
        is_stopped: Whether a stop string has been found; what follows it is ignored.
        prompt_text: The text of the prompt, as far as it is certain.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stops: Sequence[str],
        before: DetokenizerState | None = None,
    ):
        """Begins behind a prompt.

        Args:
            tokenizer: Turns ids into text.
            prompt: Ids in front of the text, which may decide how it begins.
            stops: Strings that end the text and do not belong to it.
            before: What was left open by the text in front of the prompt; None if there is none.
        """
        self._detokenizer, self._stops = tokenizer.detokenizer(before), stops
        self.prompt_text = self._detokenizer.add(prompt)
        self._held = ""  # What may be the beginning of a stop string.
        self.is_stopped = False

    @property
    def state(self) -> DetokenizerState:
        """What the stream leaves open: a character that lacks bytes."""
        return self._detokenizer.state

    def add(self, ids: Sequence[int]) -> str:
        """Takes the next ids, and returns the text that is certain by now."""
        return self._up_to_stop(self._detokenizer.add(ids))

    def finish(self, *, is_continued: bool = False) -> str:
        """Returns the rest of the text.

        Args:
            is_continued: Whether another stream goes on from `state`; then a character that lacks
                bytes is left to that one.
        """
        rest = self._up_to_stop("" if is_continued else self._detokenizer.finish())
        rest += "" if self.is_stopped else self._held
        self._held = ""
        return rest

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
