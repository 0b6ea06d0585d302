"""Tests of linear layers and embeddings."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.linear import (
    BlockDiagonal,
    Dense,
    Embedding,
    boxed_parameter,
    multiply_blocks,
    small_init,
    soft_cap,
    wang_init,
)


@pytest.mark.parametrize(
    ("init", "std"),
    [
        (small_init(4096), np.sqrt(2 / (5 * 4096))),
        (wang_init(4096, num_blocks=32), 2 / 32 / 64),
        (small_init(16), np.sqrt(1 / 40)),
        (wang_init(16, num_blocks=1), 0.5),
    ],
)
def test_normal_with_the_published_deviation(init, std):
    x = np.asarray(init(jax.random.key(0), (300, 300), jnp.float32))
    np.testing.assert_allclose(x.std(), std, rtol=0.02)
    assert abs(x.mean()) < 0.02 * std
    # Not truncated: about 240 of 90,000 normal numbers are beyond three deviations.
    assert 100 < np.sum(np.abs(x) > 3 * std) < 400


class Scale(nn.Module):
    """A module with one parameter."""

    @nn.compact
    def __call__(self, x):
        return x * boxed_parameter(self, "scale", nn.initializers.ones, (3,), ("tp",))


def test_is_created_in_a_box_and_read_with_or_without():
    x = jnp.arange(3.0)
    y, variables = Scale().init_with_output(jax.random.key(0), x)
    box = variables["params"]["scale"]
    assert isinstance(box, nn.Partitioned) and box.names == ("tp",)
    np.testing.assert_array_equal(y, x)
    boxed = {"params": {"scale": box.replace(value=box.value * 2)}}
    plain = {"params": {"scale": jnp.full(3, 2.0)}}
    for variables in (boxed, plain):
        np.testing.assert_array_equal(Scale().apply(variables, x), 2 * x)


def test_can_be_read_inside_shard_map():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tp",))
    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    spec = jax.sharding.PartitionSpec("tp")
    apply = jax.shard_map(Scale().apply, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(apply)(variables, jnp.arange(3.0)), np.arange(3.0))


def test_product_over_the_last_axis():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(shape) for shape in ((2, 3, 4), (4, 5), (5,)))
    zeros = nn.initializers.zeros
    y = Dense(5, zeros, (None, "tp")).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
    with_bias = Dense(5, zeros, (None, "tp"), zeros)
    y = with_bias.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_dense_parameters_are_float32_and_boxed():
    dense = Dense(
        5, nn.initializers.ones, ("fsdp", "tp"), nn.initializers.constant(2.0), jnp.bfloat16
    )
    y, variables = dense.init_with_output(jax.random.key(0), jnp.ones((1, 4)))
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert kernel.names == ("fsdp", "tp") and bias.names == ("tp",)
    assert kernel.value.dtype == bias.value.dtype == jnp.float32
    assert kernel.value.shape == (4, 5) and bias.value.shape == (5,)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(y, np.float32), np.full((1, 5), 6.0))


def test_no_bias_by_default():
    variables = Dense(5, nn.initializers.ones, (None, None)).init(
        jax.random.key(0), jnp.ones((1, 4))
    )
    assert set(variables["params"]) == {"kernel"}


def dense_product(x, kernel):
    """Multiplies by the matrix with the blocks on its diagonal."""
    num_blocks, size, _ = kernel.shape
    indices = jnp.arange(num_blocks * size).reshape(num_blocks, size)
    matrix = jnp.zeros((num_blocks * size,) * 2)
    return x @ matrix.at[indices[:, :, None], indices[:, None, :]].set(kernel)


# Small and large blocks have different implementations.
@pytest.mark.parametrize("size", [3, 12])
def test_product_and_gradients_are_those_of_the_matrix(size):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 2, 5, 4 * size))
    kernel = rng.standard_normal((4, size, size))

    @functools.partial(jax.jit, static_argnums=0)
    def run(product, x, kernel, dy):
        y, vjp = jax.vjp(product, x, kernel)
        return y, vjp(dy)

    with jax.enable_x64(True):
        found, expected = (run(fn, x, kernel, dy) for fn in (multiply_blocks, dense_product))
    assert found[0].dtype == np.float64
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)


def test_block_diagonal_parameters_are_float32_and_boxed():
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


def test_bounds_smoothly():
    x = np.array([-1e6, -15.0, -0.01, 0.0, 0.01, 15.0, 1e6], np.float32)
    y = np.asarray(soft_cap(x, 15.0))
    np.testing.assert_allclose(y, 15 * np.tanh(x / 15), rtol=1e-5)
    assert np.abs(y).max() <= 15
    np.testing.assert_allclose(y[2:5], x[2:5], rtol=1e-5)


def test_a_cap_of_zero_is_none():
    x = np.array([-1e6, 0.1, 1e6], np.float32)
    np.testing.assert_array_equal(soft_cap(x, 0.0), x)
