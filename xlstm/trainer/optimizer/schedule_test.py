import numpy as np
import pytest

from xlstm.trainer.optimizer.schedule import ScheduleConfig, create_schedule


def test_warm_up_then_cosine_then_constant():
    schedule = create_schedule(
        ScheduleConfig(peak_lr=2e-3, warmup_steps=10, decay_steps=110, final_lr_factor=0.1)
    )
    expected = {
        0: 0.0,
        1: 2e-4,
        5: 1e-3,
        10: 2e-3,
        35: 2e-3 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2),
        60: 2e-3 * 0.55,
        110: 2e-4,
        1000: 2e-4,
    }
    for step, rate in expected.items():
        np.testing.assert_allclose(schedule(step), rate, rtol=1e-5, atol=1e-9, err_msg=str(step))


def test_without_warm_up():
    schedule = create_schedule(ScheduleConfig(peak_lr=1.0, warmup_steps=0, decay_steps=10))
    np.testing.assert_allclose([schedule(0), schedule(10)], [1.0, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"peak_lr": 0.0}, r"schedule\.peak_lr=0\.0: it must be positive"),
        ({"peak_lr": -1e-3}, r"schedule\.peak_lr=-0\.001"),
        ({"warmup_steps": -1}, r"schedule\.warmup_steps=-1: .* at least 0"),
        ({"warmup_steps": 50, "decay_steps": 50}, r"schedule\.warmup_steps=50: .*decay_steps=50"),
        ({"final_lr_factor": -0.5}, r"schedule\.final_lr_factor=-0\.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**options)
