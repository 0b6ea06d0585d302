import dataclasses

import pytest

from xlstm.tools.benchmarks.benchmark_context import measure
from xlstm.tools.config import load_config, to_run_config


def test_all_are_timed_side_by_side():
    config = to_run_config(load_config("smoke"))
    rows = measure(config, repeats=1)
    assert list(rows) == ["mLSTM", "mLSTM, cp=1", "step, fsdp", "step, cp"]
    for base, name in (("mLSTM", "mLSTM, cp=1"), ("step, fsdp", "step, cp")):
        assert rows[name]["ratio"] == pytest.approx(
            rows[name]["median_ms"] / rows[base]["median_ms"]
        )
    odd = dataclasses.replace(config, data=dataclasses.replace(config.data, context_length=65))
    with pytest.raises(ValueError, match="does not divide over mesh.pp=1 x mesh.cp=2"):
        measure(odd, repeats=1)
