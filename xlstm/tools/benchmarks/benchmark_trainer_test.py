import dataclasses
import json
import os
import subprocess
import sys

from xlstm.dataset.testing import config_for, write_store
from xlstm.testing.patience import PATIENCE
from xlstm.tools.benchmarks import benchmark_trainer
from xlstm.tools.benchmarks.benchmark_trainer import measure, measured_config
from xlstm.tools.config import load_config, to_run_config
from xlstm.trainer.llm.train import open_training


def test_stretches_of_a_whole_run_are_timed(tmp_path):
    store = write_store(tmp_path / "store", [f"x{i} = {i}\n" * 40 for i in range(50)])
    config = to_run_config(load_config("smoke"))
    config = measured_config(dataclasses.replace(config, data=config_for(store)), 2)
    with open_training(config, str(tmp_path / "run")) as opened:
        bare, trained = measure(opened, config.trainer.num_steps)
    assert bare.shape == trained.shape == (2,)
    assert (bare > 0).all() and (trained > 0).all()
    # All measured steps were taken, and the bare loops had no effect.
    with open(tmp_path / "run" / "metrics.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [row["step"] for row in rows] == list(range(1, 51))
    assert all("loss" in row for row in rows)
    assert sorted(map(int, os.listdir(tmp_path / "run" / "checkpoints"))) == [40, 50]


def test_stores_are_looked_for_where_the_user_is(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", benchmark_trainer.__name__, "--config.data.stores=data/none"],
        env={**os.environ, "BUILD_WORKING_DIRECTORY": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 2
    assert f"{tmp_path}/data/none" in result.stderr
