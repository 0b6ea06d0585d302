import itertools

import pytest

from xlstm.dataset.batch import Phase, remaining_phases, rows_before, rows_per_shard
from xlstm.dataset.config import DataConfig

RAMP = DataConfig(batch_size=8, ramp_batch_sizes=(2, 6), ramp_steps=(3, 2))


def test_without_a_ramp():
    config = DataConfig(batch_size=8)
    assert remaining_phases(config, 5) == [Phase(8, 40, None)]
    assert remaining_phases(config, 10**12) == [Phase(8, 8 * 10**12, None)]


def test_with_a_ramp():
    sizes = [2, 2, 2, 6, 6, 8, 8, 8]
    assert [remaining_phases(RAMP, step)[0].batch_size for step in range(8)] == sizes
    rows = [0, *itertools.accumulate(sizes)]
    assert [rows_before(RAMP, step) for step in range(9)] == rows


@pytest.mark.parametrize("step", range(8))
def test_phases_are_cut_to_begin_at_the_step(step):
    phases = remaining_phases(RAMP, step)
    assert [phase.batch_size for phase in phases] == [2, 6, 8][-len(phases) :]
    assert phases[-1].num_steps is None
    for phase in phases:
        assert phase.first_row == rows_before(RAMP, step)
        step += phase.num_steps or 0
    assert step >= 5


def test_bad_input():
    with pytest.raises(ValueError, match="the step must not be negative, but is -1"):
        remaining_phases(RAMP, -1)
    with pytest.raises(ValueError, match="of 6 rows .*4 shards: choose multiples of 4"):
        rows_per_shard(6, 0, 4)
    with pytest.raises(ValueError, match="shard_index=-1: expected one from 0 to 3"):
        rows_per_shard(8, -1, 4)
    assert rows_per_shard(8, 3, 4) == 2
