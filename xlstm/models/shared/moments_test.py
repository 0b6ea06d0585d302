import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.shared.moments import moments_of


def test_parts_add_up_to_the_whole():
    x = np.random.default_rng(0).normal(3, 2, (4, 6, 10)).astype(np.float32)
    parts = [moments_of(part) for part in np.split(x, 2, axis=1)]
    count, mean, square = jax.tree.map(jnp.add, *parts)
    np.testing.assert_allclose(mean / count, x.mean(), rtol=1e-6)
    np.testing.assert_allclose(square / count, np.square(x).mean(), rtol=1e-6)


def test_many_numbers_of_a_short_type_are_not_lost():
    count, mean, _ = moments_of(jnp.full((4, 2**16), 0.75, jnp.bfloat16))
    assert mean / count == 0.75


def test_there_is_no_gradient():
    grad = jax.grad(lambda x: moments_of(x).square)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))
