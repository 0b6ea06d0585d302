"""Turns token ids into text while they come."""

import codecs
from collections.abc import Iterable
from typing import NamedTuple

from xlstm.dataset.token_pieces import TokenPieces


class DetokenizerState(NamedTuple):
    """What the text of the next ids depends on.

    Attributes:
        is_first: Whether no token with text has come yet.
        pending: Bytes that have come and are not text yet: a beginning of a character.
        unsure: Bytes behind the last token that are text only if another token follows.
    """

    is_first: bool = True
    pending: bytes = b""
    unsure: bytes = b""


class StreamingDetokenizer:
    """The text of ids, piece by piece: together it is what `Tokenizer.decode` makes of all ids.

    Bytes that are no UTF-8 become U+FFFD, as `bytes.decode("utf-8", "replace")` has it. Special
    tokens have no text.
    """

    def __init__(self, pieces: TokenPieces, state: DetokenizerState | None = None):
        """Begins a text, or goes on where another detokenizer stopped.

        Args:
            pieces: The bytes of each token.
            state: The `state` of the other one; None at the beginning of a text.
        """
        state = state or DetokenizerState()
        self._pieces, self._is_first, self._unsure = pieces, state.is_first, state.unsure
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(state.pending)

    @property
    def state(self) -> DetokenizerState:
        """What to go on from."""
        return DetokenizerState(self._is_first, self._decoder.getstate()[0], self._unsure)

    def add(self, ids: Iterable[int]) -> str:
        """Takes the next ids, and returns the text that is certain by now."""
        is_text, first = self._pieces.is_text, self._pieces.first
        middle, last = self._pieces.middle, self._pieces.last
        found = []
        for i in ids:
            if not 0 <= i < len(middle) or not is_text[i]:
                continue
            piece = first[i] if self._is_first else middle[i]
            certain = piece
            if last[i] != middle[i]:
                certain = piece[: max(0, len(piece) - len(middle[i]) + len(last[i]))]
            found += [self._unsure, certain]
            self._is_first, self._unsure = False, piece[len(certain) :]
        return self._decoder.decode(b"".join(found))

    def finish(self) -> str:
        """Returns the rest of the text; nothing may be added behind it."""
        return self._decoder.decode(b"", final=True)
