import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.models.shared.norm import LayerNorm, MultiHeadLayerNorm, RMSNorm


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape)


def test_rms_norm():
    x, scale = random(2, 3, 8), random(8)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.1) * scale
    y = RMSNorm(eps=0.1).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


def test_layer_norm():
    x, scale = random(2, 3, 8) + 1, random(8)
    centered = x - x.mean(-1, keepdims=True)
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.1) * scale
    y = LayerNorm(eps=0.1).apply({"params": {"scale": scale}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_multi_head_layer_norm_joins_the_heads():
    x, scale = random(2, 3, 5, 4) + 1, random(12)
    centered = x - x.mean(-1, keepdims=True)
    normed = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 0.1)
    expected = np.stack([np.concatenate(list(sequence), axis=-1) for sequence in normed]) * scale
    y = MultiHeadLayerNorm(eps=0.1).apply({"params": {"scale": scale}}, x)
    assert y.shape == (2, 5, 12)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm, MultiHeadLayerNorm])
def test_scales_start_at_one_in_a_box(norm):
    params = norm().init(jax.random.key(0), jnp.ones((1, 2, 3, 4)))["params"]
    assert np.all(params["scale"].value == 1)
    assert params["scale"].names == (("tp",) if norm is MultiHeadLayerNorm else (None,))


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm, MultiHeadLayerNorm])
def test_reductions_are_in_float32(norm):
    # In bfloat16 a sum of 4096 ones stops at 256.
    x = jnp.tile(jnp.asarray([1.0, -1.0], jnp.bfloat16), 2048).reshape(1, 1, 1, 4096)
    y, _ = norm(dtype=jnp.bfloat16).init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float32), x.reshape(y.shape), rtol=1e-2)
