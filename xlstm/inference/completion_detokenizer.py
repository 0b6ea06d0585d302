"""Incremental detokenization of a completion, up to a stop string."""

from collections.abc import Sequence

from xlstm.dataset.detokenizer import DetokenizerState
from xlstm.dataset.tokenizer import Tokenizer


class CompletionDetokenizer:
    """The text of the tokens that follow a prompt, as the tokens arrive.

    The prompt's text and the completion's text together are what the tokenizer decodes all ids to.
    A character that is incomplete at the end of the prompt belongs to the completion.

    Attributes:
        is_stopped: Whether a stop string has been found; later tokens are ignored.
        prompt_text: The text of the prompt, without an incomplete last character.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop_strings: Sequence[str],
        state: DetokenizerState | None = None,
    ):
        """Starts after a prompt.

        Args:
            tokenizer: The tokenizer.
            prompt: Ids of the prompt, which may affect the first characters of the completion.
            stop_strings: Strings that end the completion and are not part of it.
            state: The detokenizer's state before the prompt; None if the prompt starts a document.
        """
        self._detokenizer, self._stop_strings = tokenizer.detokenizer(state), stop_strings
        self.prompt_text = self._detokenizer.add(prompt)
        self._held = ""  # May be the beginning of a stop string.
        self.is_stopped = False

    @property
    def state(self) -> DetokenizerState:
        """The detokenizer's state after the tokens so far, with the bytes of a cut character."""
        return self._detokenizer.state

    def add(self, ids: Sequence[int]) -> str:
        """Takes the next ids, and returns the text that no later token can change."""
        return self._before_stop(self._detokenizer.add(ids))

    def finish(self, *, is_continued: bool = False) -> str:
        """Returns the rest of the text.

        Args:
            is_continued: Whether another completion continues from `state`; it then gets the bytes
                of an incomplete last character.
        """
        rest = self._before_stop("" if is_continued else self._detokenizer.finish())
        rest += "" if self.is_stopped else self._held
        self._held = ""
        return rest

    def _before_stop(self, text: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        positions = [text.find(stop) for stop in self._stop_strings if stop in text]
        if positions:
            self.is_stopped, self._held = True, ""
            return text[: min(positions)]
        held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest end of a text that a stop string may begin with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
