import numpy as np

from xlstm.models.shared.soft_cap import soft_cap


def test_bounds_smoothly():
    x = np.array([-1e6, -15.0, -0.01, 0.0, 0.01, 15.0, 1e6], np.float32)
    y = np.asarray(soft_cap(x, 15.0))
    np.testing.assert_allclose(y, 15 * np.tanh(x / 15), rtol=1e-5)
    assert np.abs(y).max() <= 15
    np.testing.assert_allclose(y[2:5], x[2:5], rtol=1e-5)


def test_a_cap_of_zero_is_none():
    x = np.array([-1e6, 0.1, 1e6], np.float32)
    np.testing.assert_array_equal(soft_cap(x, 0.0), x)
