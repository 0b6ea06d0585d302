"""Counts the floating-point operations that training needs."""

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.registry import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig


def count_flops_per_token(config: LanguageModelConfig, context_length: int) -> int:
    """Counts the useful operations of a training step: those of the matrix products.

    The backward pass needs twice what the forward pass does. What is computed again in order not to
    be kept (`model.remat`), masked pairs of tokens and padding do not count.

    Args:
        config: Configuration of the model; the backend matters, since some need less work.
        context_length: Tokens in an example, T.

    Returns:
        Floating-point operations a token, two for a multiplication with its addition.
    """
    model = config.model
    qkv = 2 * model.qk_dim + model.v_dim
    gates_and_out = 2 * model.num_heads + 2 * model.v_dim
    block = model.embedding_dim * (qkv + gates_and_out + 3 * model.ffn_dim)
    head = model.embedding_dim * model.vocab_size
    cells = model.num_blocks * _cell_flops(model, config.backend, context_length)
    return 3 * (2 * (model.num_blocks * block + head) + cells)


def _cell_flops(model: ModelConfig, backend: BackendConfig, context_length: int) -> int:
    """Operations of the mLSTM cell of all heads of a block, forward."""
    # A token sees half of the tokens of its chunk, on average, with two products for each.
    a_pair = model.qk_dim + model.v_dim
    if backend.name == "parallel_stabilized":
        return context_length * a_pair
    chunk_size = backend.chunk_size or context_length if backend.name == "fwbw" else 1
    # Two products more, to write the state and to read it.
    state = 4 * model.qk_dim * model.v_dim // model.num_heads
    return min(chunk_size, context_length) * a_pair + state
