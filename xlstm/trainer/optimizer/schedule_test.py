import jax
import numpy as np
import optax
import pytest

from xlstm.trainer.optimizer.schedule import ScheduleConfig, create_schedule


def _assert_rates(config, expected):
    schedule = create_schedule(config)
    compiled = jax.jit(schedule)
    for step, rate in expected.items():
        found = compiled(step)
        assert found >= 0
        np.testing.assert_allclose(found, rate, rtol=1e-5, atol=1e-9, err_msg=str(step))
    rates = schedule(np.array(list(expected)))
    np.testing.assert_allclose(rates, list(expected.values()), rtol=1e-5, atol=1e-9)


def test_warm_up_then_cosine_then_constant():
    _assert_rates(
        ScheduleConfig(peak_lr=2e-3, warmup_steps=10, decay_steps=110, final_lr_factor=0.1),
        {
            0: 0.0,
            1: 2e-4,
            5: 1e-3,
            10: 2e-3,
            35: 2e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2),
            60: 2e-3 * 0.55,
            110: 2e-4,
            1000: 2e-4,
        },
    )


def test_cosine_with_a_cooldown():
    config = ScheduleConfig(peak_lr=1.0, warmup_steps=0, decay_steps=10, cooldown_steps=4)
    _assert_rates(config, {0: 1.0, 5: 0.55, 10: 0.1, 11: 0.075, 13: 0.025, 14: 0.0, 99: 0.0})


def test_warm_up_then_stable_then_cooldown():
    config = ScheduleConfig(
        peak_lr=2.0, warmup_steps=4, decay="constant", decay_steps=100, cooldown_steps=10
    )
    _assert_rates(
        config, {0: 0.0, 2: 1.0, 4: 2.0, 50: 2.0, 100: 2.0, 101: 1.8, 105: 1.0, 110: 0.0, 999: 0.0}
    )


def test_constant_after_the_warm_up():
    config = ScheduleConfig(peak_lr=2.0, warmup_steps=4, decay="constant", decay_steps=100)
    _assert_rates(config, {0: 0.0, 3: 1.5, 4: 2.0, 100: 2.0, 10**6: 2.0})


def test_exponential_with_and_without_a_cooldown():
    options = {"peak_lr": 5e-4, "warmup_steps": 3, "decay": "exponential", "decay_steps": 203}
    start = {0: 0.0, 1: 5e-4 / 3, 3: 5e-4, 53: 5e-4 * 0.1**0.25, 103: 5e-4 * 0.1**0.5, 203: 5e-5}
    _assert_rates(ScheduleConfig(**options), start | {204: 5e-5, 10**6: 5e-5})
    config = ScheduleConfig(cooldown_steps=50, **options)
    _assert_rates(config, start | {204: 4.9e-5, 228: 2.5e-5, 253: 0.0, 10**6: 0.0})


def test_a_far_fall_in_few_steps_is_finite_before_it():
    config = ScheduleConfig(
        peak_lr=1.0,
        warmup_steps=1000,
        decay="exponential",
        decay_steps=1001,
        final_lr_factor=1e-3,
    )
    _assert_rates(config, {0: 0.0, 500: 0.5, 1000: 1.0, 1001: 1e-3})


def test_a_cooldown_leaves_the_steps_before_it_as_they_were():
    steps = np.arange(1000)
    options = {"decay": "exponential", "decay_steps": 1000}
    before = create_schedule(ScheduleConfig(**options))(steps)
    after = create_schedule(ScheduleConfig(cooldown_steps=100, **options))(steps)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("warmup_steps", [0, 30])
def test_the_cosine_is_that_of_optax(warmup_steps):
    config = ScheduleConfig(peak_lr=3e-3, warmup_steps=warmup_steps, decay_steps=350)
    expected = optax.warmup_cosine_decay_schedule(0.0, 3e-3, warmup_steps, 350, 3e-3 * 0.1)
    steps = np.arange(400)
    np.testing.assert_array_equal(create_schedule(config)(steps), expected(steps))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peak_lr": 0.0}, r"schedule\.peak_lr=0\.0: it must be positive"),
        ({"peak_lr": -1e-3}, r"schedule\.peak_lr=-0\.001"),
        ({"warmup_steps": -1}, r"schedule\.warmup_steps=-1: .* at least 0"),
        ({"warmup_steps": 50, "decay_steps": 50}, r"schedule\.warmup_steps=50: .*decay_steps=50"),
        ({"decay": "linear"}, r"schedule\.decay='linear': .*one of cosine, exponential, constant"),
        ({"final_lr_factor": -0.5}, r"schedule\.final_lr_factor=-0\.5"),
        (
            {"final_lr_factor": 0.0, "decay": "exponential"},
            r"schedule\.final_lr_factor=0\.0: it must be positive",
        ),
        ({"cooldown_steps": -5}, r"schedule\.cooldown_steps=-5: it must not be negative"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)
