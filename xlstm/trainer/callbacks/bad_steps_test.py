import math

import pytest

from xlstm.trainer.base.soundness import Soundness
from xlstm.trainer.base.trainer import RollBack
from xlstm.trainer.callbacks.bad_steps import BadStepsCallback

_GOOD = {"loss": 2.0, "grad_norm": 1.0, "param_norm": 9.0, "update_norm": 0.1, "skipped": 0.0}
_NAN = _GOOD | {"loss": math.nan, "grad_norm": math.nan, "update_norm": 0.0, "skipped": 1.0}
_OUTLIER = _GOOD | {"grad_norm": 1e3, "update_norm": 0.0, "skipped": 1.0}
_SPIKE = _GOOD | {"loss": 8.0}


class _Run:
    """A callback, and a record of what it did."""

    def __init__(self, policy, max_skipped_steps=3, confirmed_step=40):
        self.dumped, self.reports = [], []
        self.soundness = Soundness(2, max_loss_spike=2.0, max_update_ratio=1.0)
        self.callback = BadStepsCallback(
            policy,
            max_skipped_steps,
            self.soundness,
            confirmed_step=lambda: confirmed_step,
            dump_batch=self._dump,
            roll_back=lambda step, state: ("rolled back", step, state),
            report=self.reports.append,
        )

    def _dump(self, step):
        self.dumped.append(step)
        return f"its batch is in step_{step}"

    def tell(self, first_step, *rows):
        for step, row in enumerate(rows, start=first_step):
            self.callback.on_metrics(step, row)


def test_good_steps_are_nothing_to_speak_of():
    run = _Run("stop")
    run.tell(1, _GOOD, _GOOD)
    assert run.dumped == run.reports == []


@pytest.mark.parametrize(
    "row",
    [
        _NAN,
        _NAN | {"loss": 1.0, "grad_norm": math.inf},
        _GOOD | {"update_norm": math.inf},
        _GOOD | {"param_norm": math.nan},
    ],
)
@pytest.mark.parametrize(
    "confirmed_step, advice",
    [
        (5, "The last confirmed checkpoint is that of step 5: resume from it with --allow_conf"),
        (None, "No checkpoint is confirmed: start from scratch in another --workdir and a lower "),
    ],
)
def test_stop_ends_the_run_and_says_how_to_go_on(row, confirmed_step, advice):
    run = _Run("stop", confirmed_step=confirmed_step)
    with pytest.raises(
        ValueError, match="diverged at step 7 .*; its batch is in step_7. "
    ) as error:
        run.tell(7, row)
    assert advice in str(error.value) and "schedule.peak_lr" in str(error.value)
    assert run.dumped == [7]


@pytest.mark.parametrize("name", ["param_norm", "update_norm"])
def test_skip_ends_the_run_when_the_parameters_are_ruined(name):
    run = _Run("skip")
    with pytest.raises(ValueError, match="parameters are no longer finite.*step 40: resume"):
        run.tell(7, _NAN | {name: math.inf})


def test_a_streak_that_is_not_sound_is_named_once():
    run = _Run("stop")
    run.tell(1, _GOOD, _SPIKE, _SPIKE, _GOOD, _SPIKE)
    first, second = run.reports
    assert first.startswith("step 2 is not sound: its loss of 8 is a spike above the usual 2. The")
    assert second.startswith("step 5 is not sound: ")
    assert not run.soundness.confirms() and run.dumped == []


def test_steps_are_judged_under_every_policy():
    run = _Run("skip")
    run.tell(1, _GOOD, _NAN)
    assert not run.soundness.confirms()
    run.tell(3, _GOOD)
    assert run.soundness.confirms()


def test_skip_says_so_and_goes_on():
    run = _Run("skip")
    run.tell(4, _GOOD, _NAN, _GOOD, _NAN)
    assert run.dumped == [5, 7]
    assert (
        "diverged at step 5 (loss=nan, grad_norm=nan, param_norm=9, update_norm=0); its batch"
        in run.reports[0]
    )


def test_rollback_restores_a_state_for_the_step():
    run = _Run("rollback")
    with pytest.raises(RollBack) as caught:
        run.tell(9, _NAN)
    assert caught.value.restore("state") == ("rolled back", 9, "state")
    assert run.dumped == [9]


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_outliers_are_skipped_under_every_policy(policy):
    run = _Run(policy)
    run.tell(1, _OUTLIER, _GOOD)
    assert run.dumped == []
    assert run.reports[0].startswith("step 1 was skipped: its gradient norm is an outlier")
    assert "grad_norm=1000" in run.reports[0]


@pytest.mark.parametrize("row", [_NAN, _OUTLIER])
def test_too_many_in_a_row_end_the_run(row):
    run = _Run("skip")
    run.tell(1, row, row, _GOOD, row, row)
    with pytest.raises(ValueError, match="the last of 3 such steps in a row"):
        run.tell(6, row)
