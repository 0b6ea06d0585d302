import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.shared.embedding import Embedding


def test_looks_ids_up():
    table = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    tokens = np.array([[6, 0, 3], [1, 1, 2]])
    embedding = Embedding(7, 3, nn.initializers.zeros)
    y = embedding.apply({"params": {"embedding": table}}, tokens)
    np.testing.assert_array_equal(y, table[tokens])


def test_table_is_float32_and_boxed():
    embedding = Embedding(7, 3, nn.initializers.ones, jnp.bfloat16)
    y, variables = embedding.init_with_output(jax.random.key(0), jnp.zeros((1, 2), int))
    table = variables["params"]["embedding"]
    assert table.names == ("tp", None)
    assert table.value.shape == (7, 3) and table.value.dtype == jnp.float32
    assert y.dtype == jnp.bfloat16 and y.shape == (1, 2, 3)
