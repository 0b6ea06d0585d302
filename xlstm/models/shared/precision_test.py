import jax
import jax.numpy as jnp
import pytest
from jax.lax import Precision

from xlstm.models.shared.linear import BlockDiagonal, Dense
from xlstm.models.shared.precision import product_precision
from xlstm.testing.lowered_products import gpu_products


@pytest.mark.parametrize(
    "dtypes, asked",
    [
        (("float32", "float32"), Precision.HIGH),
        (("bfloat16", "float32"), Precision.HIGH),
        (("float32", "bfloat16"), Precision.HIGH),
        (("bfloat16", "bfloat16"), None),
        (("float16", "bfloat16"), None),
    ],
)
def test_only_float32_is_asked_for(dtypes, asked):
    operands = [jnp.zeros(1, dtype) for dtype in dtypes]
    assert product_precision(Precision.HIGH, *operands) == asked
    assert product_precision(None, *operands) is None


def _layers(**options):
    yield Dense(8, jax.nn.initializers.ones, (None, None), **options)
    yield BlockDiagonal(16, **options)


@pytest.mark.parametrize("ambient", ["default", "highest"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layers_and_their_gradients_ask_whatever_jax_is_set_to(ambient, dtype):
    x = jnp.ones((4, 32))
    with jax.default_matmul_precision(ambient):
        for layer in _layers(dtype=dtype, precision=Precision.HIGH):
            gradient = jax.grad(lambda v, x, layer=layer: layer.apply(v, x).sum(), (0, 1))
            variables = layer.init(jax.random.key(0), x)
            products = gpu_products(jax.jit(gradient).trace(variables, x))
            assert len(products) >= 2
            asked = "HIGH" if dtype == jnp.float32 else ambient.upper()
            assert {product.precisions for product in products} == {(asked, asked)}


@pytest.mark.parametrize("ambient, asked", [(None, "DEFAULT"), ("highest", "HIGHEST")])
def test_without_a_precision_jax_decides(ambient, asked):
    x = jnp.ones((4, 32))
    with jax.default_matmul_precision(ambient):
        for layer in _layers():
            variables = layer.init(jax.random.key(0), x)
            (product,) = gpu_products(jax.jit(layer.apply).trace(variables, x))
            assert product.precisions == (asked, asked)
