"""What the input pipeline hands to a training or evaluation step."""

from collections.abc import Sequence

import flax.struct
import jax
import numpy as np


@flax.struct.dataclass
class Batch:
    """Some rows of token windows, with what the loss and the model need to know of each token.

    The rows come packed from a token store: a row may begin in the middle of a document and may
    hold several documents, one behind the other, without padding.

    Attributes:
        inputs: `(B, T)` int32, the tokens that the model reads.
        targets: `(B, T)` int32, for each input the token that follows it.
        targets_mask: `(B, T)` bool, True where the target counts in the loss.
        reset: `(B, T)` bool, True where the input is the first token of a document: the model
            drops its state before it reads that token.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    targets_mask: np.ndarray | jax.Array
    reset: np.ndarray | jax.Array


def full_batch(windows: np.ndarray, bos_id: int) -> Batch:
    """Turns full windows into a batch.

    Args:
        windows: `(B, T + 1)` int32.
        bos_id: The marker that every document begins with.

    Returns:
        The batch of NumPy arrays `(B, T)`.
    """
    inputs = np.ascontiguousarray(windows[:, :-1])
    return Batch(
        inputs=inputs,
        targets=np.ascontiguousarray(windows[:, 1:]),
        targets_mask=np.ones(inputs.shape, bool),
        reset=inputs == bos_id,
    )


def padded_batch(windows: Sequence[np.ndarray], shape: tuple[int, int], bos_id: int) -> Batch:
    """Turns windows, some perhaps short or missing, into a batch.

    Args:
        windows: At most `B` of at most `T + 1` tokens.
        shape: `(B, T + 1)`.
        bos_id: The marker that every document begins with; it fills the places without a token.

    Returns:
        The batch of NumPy arrays `(B, T)`, its mask False where there is no token.
    """
    padded = np.full(shape, bos_id, np.int32)
    present = np.zeros(shape, bool)
    for row, window in enumerate(windows):
        padded[row, : window.size] = window
        present[row, : window.size] = True
    return full_batch(padded, bos_id).replace(targets_mask=present[:, 1:])
