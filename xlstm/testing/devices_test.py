import jax


def test_devices_are_simulated_on_the_cpu():
    assert jax.device_count() == 8
    assert jax.default_backend() == "cpu"
