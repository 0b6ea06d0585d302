"""The number of floating-point operations in a training step."""

from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig

# Tokens in a chunk that are counted where the device decides: few, so that the useful work is the
# same on every device, and a larger chunk does not count as more of it.
_COUNTED_CHUNK_SIZE = 64


def count_flops_per_token(config: LanguageModelConfig, context_length: int) -> int:
    """Counts the useful operations of a training step, in matrix products and convolutions.

    The backward pass counts twice as much as the forward pass. Recomputation (`model.remat`),
    masked pairs of tokens, and padding do not count. `backend.chunk_size=-1` counts as 64, whatever
    the device takes.

    Args:
        config: Configuration of the model and its backend, whose work per token differs.
        context_length: Number of tokens in an example, T.

    Returns:
        Floating-point operations per token; a multiplication and its addition are two.
    """
    model = config.model
    total = 2 * model.embedding_dim * model.vocab_size
    for kind, count in model.pattern.counts.items():
        if kind == "slstm":
            cell = 8 * model.embedding_dim**2 // model.num_heads  # The recurrent product.
        else:
            cell = _mlstm_flops(model, config.backend, context_length)
        total += count * (2 * _PRODUCTS[kind](model) + cell)
    return 3 * total


def _products_of_7b(model: ModelConfig) -> int:
    """Returns the forward multiplications per token outside of the cell, for `xlstm_7b`."""
    qkv = 2 * model.qk_dim + model.v_dim
    gates_and_out = 2 * model.num_heads + 2 * model.v_dim
    return model.embedding_dim * (qkv + gates_and_out + 3 * model.ffn_dim)


def _products_of_2024(model: ModelConfig) -> int:
    """Returns the forward multiplications per token outside of the cell, for `xlstm_2024`."""
    up_and_down = 3 * model.embedding_dim
    qkv_and_gates = 3 * model.qkv_block_size + 3 * 2 * model.num_heads
    return model.inner_dim * (up_and_down + model.conv_width + qkv_and_gates)


def _products_of_slstm(model: ModelConfig) -> int:
    """Returns the forward multiplications per token outside of the cell, for `slstm`."""
    gates = 4 * model.embedding_dim // model.num_heads
    return model.embedding_dim * (model.conv_width + gates + 3 * model.slstm_ffn_dim)


_PRODUCTS = {
    "xlstm_7b": _products_of_7b,
    "xlstm_2024": _products_of_2024,
    "slstm": _products_of_slstm,
}


def _mlstm_flops(model: ModelConfig, backend: BackendConfig, context_length: int) -> int:
    """Returns the forward operations per token of the mLSTM cell of a block, over all heads."""
    # On average a token attends to half of its chunk, with two products for each token.
    per_pair = model.qk_dim + model.v_dim
    if backend.name == "parallel_stabilized":
        return context_length * per_pair
    chunk_size = 1
    if backend.name == "fwbw":
        chunk_size = {-1: _COUNTED_CHUNK_SIZE, 0: context_length}.get(
            backend.chunk_size, backend.chunk_size
        )
    # Two more products, to write the state and to read it.
    state = 4 * model.qk_dim * model.v_dim // model.num_heads
    return min(chunk_size, context_length) * per_pair + state
