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
    assert table.names == (("pp", "tp"), None)
    assert table.value.shape == (7, 3) and table.value.dtype == jnp.float32
    assert y.dtype == jnp.bfloat16 and y.shape == (1, 2, 3)


def test_the_gradient_of_a_frequent_token_is_summed_in_float32():
    embedding = Embedding(7, 3, nn.initializers.zeros, jnp.bfloat16)
    tokens = jnp.full((2, 600), 4)

    def total(table):
        return jnp.sum(embedding.apply({"params": {"embedding": table}}, tokens), dtype=jnp.float32)

    grads = jax.grad(total)(jnp.zeros((7, 3)))
    np.testing.assert_array_equal(grads, np.eye(7)[4][:, None] * np.full((1, 3), 1200.0))
