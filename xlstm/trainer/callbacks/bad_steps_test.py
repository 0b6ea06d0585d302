import math

import pytest

from xlstm.trainer.base.callback import RollBack
from xlstm.trainer.callbacks.bad_steps import BadStepsCallback

_GOOD = {"loss": 2.0, "grad_norm": 1.0, "skipped": 0.0}
_NAN = {"loss": math.nan, "grad_norm": math.nan, "skipped": 1.0}
_OUTLIER = {"loss": 2.0, "grad_norm": 1e3, "skipped": 1.0}


class _Run:
    """A callback, and what it did."""

    def __init__(self, policy, max_skipped_steps=3):
        self.dumped, self.reports = [], []
        self.callback = BadStepsCallback(
            policy,
            max_skipped_steps,
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


@pytest.mark.parametrize("row", [_NAN, _NAN | {"loss": 1.0, "grad_norm": math.inf}])
def test_stop_ends_the_run(row):
    run = _Run("stop")
    with pytest.raises(ValueError, match="diverged at step 7 .*; its batch is in step_7; nothing"):
        run.tell(7, row)
    assert run.dumped == [7]


def test_skip_says_so_and_goes_on():
    run = _Run("skip")
    run.tell(4, _GOOD, _NAN, _GOOD, _NAN)
    assert run.dumped == [5, 7]
    assert "diverged at step 5 (loss=nan, grad_norm=nan); its batch" in run.reports[0]


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
    assert run.reports[0].startswith("step 1 was left out: its gradient norm is an outlier")
    assert "grad_norm=1000" in run.reports[0]


@pytest.mark.parametrize("row", [_NAN, _OUTLIER])
def test_too_many_in_a_row_end_the_run(row):
    run = _Run("skip")
    run.tell(1, row, row, _GOOD, row, row)
    with pytest.raises(ValueError, match="the last of 3 such steps in a row"):
        run.tell(6, row)
