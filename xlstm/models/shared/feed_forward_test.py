import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.feed_forward import GatedFeedForward, feed_forward_dim


@pytest.mark.parametrize(
    ("embedding_dim", "factor", "multiple", "expected"),
    [(4096, 2.667, 64, 10944), (128, 2.667, 64, 384), (128, 1.0, 64, 128), (96, 1.0, 64, 128)],
)
def test_hidden_size(embedding_dim, factor, multiple, expected):
    assert feed_forward_dim(embedding_dim, factor, multiple) == expected


def test_against_numpy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 4))
    gate, up, down = (rng.standard_normal(shape) for shape in ((4, 6), (4, 6), (6, 4)))
    params = {
        "proj_up_gate": {"kernel": gate},
        "proj_up": {"kernel": up},
        "proj_down": {"kernel": down},
    }
    z = x @ gate
    expected = (z / (1 + np.exp(-z)) * (x @ up)) @ down
    y = GatedFeedForward(6, num_blocks=2).apply({"params": params}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_is_cut_over_the_hidden_features():
    ffn = GatedFeedForward(6, num_blocks=2, dtype=jnp.bfloat16)
    y, variables = ffn.init_with_output(jax.random.key(0), jnp.ones((1, 4)))
    names = {name: layer["kernel"].names for name, layer in variables["params"].items()}
    assert names == {
        "proj_up_gate": (None, "tp"),
        "proj_up": (None, "tp"),
        "proj_down": ("tp", None),
    }
    assert y.dtype == jnp.bfloat16
