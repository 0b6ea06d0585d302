import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.block_diagonal import BlockDiagonal, multiply_blocks
from xlstm.testing.quick_compilation import QUICK_COMPILATION


def dense_product(x, kernel):
    """The product with the matrix that has the blocks on its diagonal."""
    num_blocks, size, _ = kernel.shape
    places = jnp.arange(num_blocks * size).reshape(num_blocks, size)
    matrix = jnp.zeros((num_blocks * size,) * 2)
    return x @ matrix.at[places[:, :, None], places[:, None, :]].set(kernel)


# Small blocks are multiplied otherwise than large ones.
@pytest.mark.parametrize("size", [3, 12])
def test_product_and_gradients_are_those_of_the_matrix(size):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 5, 4 * size))
    kernel = rng.standard_normal((4, size, size))

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILATION, static_argnums=0)
    def run(product, x, kernel, dy):
        y, vjp = jax.vjp(product, x, kernel)
        return y, vjp(dy)

    with jax.enable_x64(True):
        found, expected = (run(fn, x, kernel, dy) for fn in (multiply_blocks, dense_product))
    assert found[0].dtype == np.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_parameters_are_float32_and_boxed():
    y, variables = BlockDiagonal(4, jnp.bfloat16).init_with_output(
        jax.random.key(0), jnp.ones((1, 4096))
    )
    kernel = variables["params"]["kernel"]
    assert kernel.names == ("tp", None, None)
    assert kernel.value.shape == (1024, 4, 4) and kernel.value.dtype == jnp.float32
    np.testing.assert_allclose(kernel.value.std(), np.sqrt(2 / (5 * 4)), rtol=0.03)
    assert y.dtype == jnp.bfloat16


def test_a_bias_is_added():
    x = jnp.ones((1, 8))
    with_bias = BlockDiagonal(4, bias_init=lambda rng, shape, dtype: jnp.arange(8.0))
    y, variables = with_bias.init_with_output(jax.random.key(0), x)
    assert variables["params"]["bias"].names == ("tp",)
    without = {"params": {"kernel": variables["params"]["kernel"]}}
    expected = BlockDiagonal(4).apply(without, x) + np.arange(8.0)
    np.testing.assert_allclose(y, expected, atol=1e-6)
