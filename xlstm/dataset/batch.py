"""What the input pipeline hands to a training or evaluation step."""

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
