import json
import math
import re

import pytest

from xlstm.trainer.base.soundness import Soundness

_GOOD = {"loss": 3.0, "grad_norm": 1.0, "param_norm": 10.0, "update_norm": 0.1, "skipped": 0.0}


def _create(confirm_steps=4):
    return Soundness(confirm_steps, max_loss_spike=2.0, max_update_ratio=1.0)


def _judge(soundness, *rows):
    return [soundness.judge(_GOOD | row) for row in rows]


def test_a_short_run_is_confirmed_while_all_its_steps_are_sound():
    soundness = _create()
    for _ in range(7):
        assert soundness.judge(_GOOD) is None
        assert soundness.confirms()


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"loss": math.nan}, "loss=nan"),
        ({"grad_norm": math.inf}, "grad_norm=inf"),
        ({"param_norm": math.inf}, "param_norm=inf"),
        ({"update_norm": math.nan}, "update_norm=nan"),
        ({"loss": 5.1}, "its loss of 5.1 is a spike above the usual 3"),
        ({"update_norm": 10.1}, "the norm of its update, 10.1, is too large for .* norm 10"),
        ({"param_norm": 20.5}, "the growth of the parameters' norm, 10.5, is too large for .* 10"),
    ],
)
def test_a_bad_step_and_too_few_after_it_confirm_nothing(row, reason):
    soundness = _create()
    _judge(soundness, *[{}] * 10)
    assert soundness.confirms()
    (found,) = _judge(soundness, row)
    assert re.search(reason, found)
    confirmed = []
    for _ in range(6):
        confirmed.append(soundness.confirms())
        assert soundness.judge(_GOOD) is None
    assert confirmed == [False] * 4 + [True] * 2


@pytest.mark.parametrize("row", [{"loss": math.nan}, {"grad_norm": math.inf}, {"loss": 9.0}])
def test_one_sound_step_confirms_that_a_step_was_well_left_out(row):
    soundness, confirmed = _create(), []
    left_out = row | {"skipped": 1.0}
    for change in [{}, left_out, left_out, {}, {}]:
        soundness.judge(_GOOD | change)
        confirmed.append(soundness.confirms())
    assert confirmed == [True, False, False, True, True]


def test_leaving_steps_out_does_not_mend_the_parameters():
    soundness = _create()
    rows = [{}, {"update_norm": 1e3}, {"param_norm": 1e3, "loss": math.nan, "skipped": 1.0}]
    _judge(soundness, *rows, {})
    assert not soundness.confirms()


@pytest.mark.parametrize(
    "row", [{"loss": 4.9}, {"loss": 0.1}, {"update_norm": 0.99}, {"param_norm": 19.9}]
)
def test_what_is_within_the_limits_is_sound(row):
    soundness = _create()
    assert _judge(soundness, {}, row) == [None, None]


def test_losses_that_vary_much_have_larger_spikes():
    """As with one example of mixed text per step."""
    soundness = _create()
    assert _judge(soundness, *[{"loss": loss} for loss in [1.0, 2.5, 4.0, 2.5] * 10 + [6.0]]) == (
        [None] * 41
    )
    (fault,) = _judge(soundness, {"loss": 9.0})
    assert fault.startswith("its loss of 9 is a spike")


def test_a_falling_loss_is_not_one_that_varies():
    soundness = _create()
    falling = [{"loss": 10 - 0.1 * step} for step in range(50)]
    assert _judge(soundness, *falling, {"loss": 9.0}, {"loss": 9.7})[-2:] == [
        None,
        "its loss of 9.7 is a spike above the usual 7.53",
    ]


def test_a_ruined_model_never_becomes_the_measure():
    """As after a learning rate of 1e3: finite, but permanently at the loss of a guess."""
    soundness = _create()
    _judge(soundness, {}, {"param_norm": 10.1})
    ruined = {"param_norm": 5e9, "update_norm": 0.1, "grad_norm": 0.0}
    reasons = _judge(soundness, *[ruined] * 200)
    assert all("growth" in reason for reason in reasons)
    assert not soundness.confirms()


def test_norms_may_drift_and_losses_a_little():
    soundness = _create()
    rows = [{"loss": 3 + 0.003 * step, "param_norm": 10 * 1.01**step} for step in range(500)]
    assert _judge(soundness, *rows) == [None] * 500


def test_a_loss_that_climbs_slowly_is_not_sound_until_it_is_back():
    soundness = _create()
    losses = [4 - 0.01 * step for step in range(100)]
    losses += [3 + 0.01 * step for step in range(400)]
    faults = _judge(soundness, *[{"loss": loss} for loss in losses])
    first = next(index for index, fault in enumerate(faults) if fault)
    assert faults[first] == "its loss has climbed to 5.13 from 3.125"
    assert all(faults[first:]) and not soundness.confirms()
    assert _judge(soundness, *[{"loss": 5.0}] * 4) == [None] * 4
    assert soundness.confirms()


def test_a_first_update_larger_than_the_parameters_is_not_sound():
    soundness = _create()
    assert "too large" in soundness.judge(_GOOD | {"update_norm": 200.0})
    assert not soundness.confirms()


def test_an_update_far_above_the_last_ones_is_not_sound():
    """The loss shows it a step later, when a checkpoint may have been written."""
    soundness = _create()
    _judge(soundness, *[{}] * 20, {"update_norm": 0.9}, {"update_norm": 0.9, "skipped": 1.0})
    assert soundness.confirms()
    (fault,) = _judge(soundness, {"update_norm": 4.0})
    assert fault.startswith("the norm of its update, 4, is far above the usual 0.1")
    assert not soundness.confirms()


def test_updates_may_grow_as_in_a_warm_up():
    soundness = _create()
    rows = [{"update_norm": 0.04 * step} for step in range(200)]
    assert _judge(soundness, *rows) == [None] * 200


def test_parameters_that_begin_at_zero_may_be_anything():
    soundness = _create()
    assert _judge(soundness, {"param_norm": 0.0}, {"param_norm": 0.0}) == [None, None]


def test_with_no_steps_to_confirm_everything_counts():
    soundness = _create(confirm_steps=0)
    soundness.judge(_GOOD | {"loss": math.nan})
    assert soundness.confirms()


@pytest.mark.parametrize("bad", [0, 3, 7, 60])
def test_a_run_that_was_interrupted_judges_as_an_undisturbed_one(bad):
    rows = [_GOOD | {"loss": 3.0 - 0.01 * step} for step in range(80)]
    rows[bad] = rows[bad] | {"loss": math.nan}
    undisturbed, other, found = _create(), _create(), []
    for row in rows:
        saved = json.loads(json.dumps(other.to_dict()))
        other = _create()
        other.from_dict(saved)
        assert other.judge(row) == undisturbed.judge(row)
        found.append(other.confirms())
        assert found[-1] == undisturbed.confirms()
    assert other.to_dict() == undisturbed.to_dict()
    assert found.index(False) == bad and found[-1]


def test_a_record_of_before_there_was_a_lowest_loss_is_read():
    soundness, other = _create(), _create()
    _judge(soundness, *[{}] * 60)
    record = soundness.to_dict()
    del record["lowest_loss"]
    other.from_dict(record)
    _judge(other, {})
    assert other.to_dict() == soundness.to_dict()


def test_a_checkpoint_without_a_record_counts():
    soundness = _create()
    soundness.from_dict(None)
    assert soundness.confirms()
    soundness.judge(_GOOD | {"loss": 99.0})  # The first step is compared with nothing.
    assert soundness.confirms()
