"""Streaming conversion of token ids to text."""

import codecs
from collections.abc import Iterable
from typing import NamedTuple

from xlstm.dataset.token_pieces import TokenPieces


class DetokenizerState(NamedTuple):
    """The state between two calls of `StreamingDetokenizer.add`.

    Attributes:
        is_first: Whether no token with text has been added yet.
        pending: The bytes of an incomplete character.
        unsure: The last token's final bytes that are text only if another token follows.
    """

    is_first: bool = True
    pending: bytes = b""
    unsure: bytes = b""


class StreamingDetokenizer:
    """An incremental decoder of ids, whose outputs add up to `Tokenizer.decode` of all ids.

    Invalid UTF-8 becomes U+FFFD, as in `bytes.decode("utf-8", "replace")`. Special tokens have no
    text.
    """

    def __init__(self, pieces: TokenPieces, state: DetokenizerState | None = None):
        """Starts a text, or continues one.

        Args:
            pieces: The bytes of each token.
            state: The `state` of the detokenizer to continue; None at the start of a text.
        """
        state = state or DetokenizerState()
        self._pieces, self._is_first, self._unsure = pieces, state.is_first, state.unsure
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(state.pending)

    @property
    def state(self) -> DetokenizerState:
        """The state from which another detokenizer can continue."""
        return DetokenizerState(self._is_first, self._decoder.getstate()[0], self._unsure)

    def add(self, ids: Iterable[int]) -> str:
        """Adds the next ids and returns the text that no later id can change."""
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
        """Returns the rest of the text; call it once, at the end."""
        return self._decoder.decode(b"", final=True)
