import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.shared.dense import Dense


def test_product_over_the_last_axis():
    rng = np.random.default_rng(0)
    x, kernel, bias = (rng.standard_normal(shape) for shape in ((2, 3, 4), (4, 5), (5,)))
    zeros = nn.initializers.zeros
    y = Dense(5, zeros, (None, "tp")).apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
    with_bias = Dense(5, zeros, (None, "tp"), zeros)
    y = with_bias.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(y, x @ kernel + bias, rtol=1e-5, atol=1e-6)


def test_parameters_are_float32_and_boxed():
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
