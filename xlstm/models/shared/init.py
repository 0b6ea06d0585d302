"""Initial distributions of the weights."""

import math

from flax.linen import initializers


def small_init(embedding_dim: int) -> initializers.Initializer:
    """Normal with standard deviation `sqrt(2 / (5 D))`, for embeddings and in-projections.

    Args:
        embedding_dim: `D`.

    References:
        Nguyen and Salazar, "Transformers without Tears", 2019, section 2.2.
    """
    return initializers.normal(math.sqrt(2 / (5 * embedding_dim)))


def wang_init(embedding_dim: int, num_blocks: int) -> initializers.Initializer:
    """Normal with standard deviation `2 / (num_blocks sqrt(D))`, for out-projections.

    Args:
        embedding_dim: `D`.
        num_blocks: Number of residual blocks.

    References:
        Wang and Komatsuzaki, "Mesh-Transformer-JAX", 2021.
    """
    return initializers.normal(2 / (num_blocks * math.sqrt(embedding_dim)))
