import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.init import small_init, wang_init


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
    # Not cut off: of 90,000 normal numbers some 240 are beyond three deviations.
    assert 100 < np.sum(np.abs(x) > 3 * std) < 400
