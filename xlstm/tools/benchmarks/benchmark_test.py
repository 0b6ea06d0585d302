import collections
import json
import os
import subprocess
import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from xlstm.testing.patience import PATIENCE
from xlstm.tools.benchmarks import backends, train_step
from xlstm.tools.benchmarks import benchmark as tool
from xlstm.tools.config import define_config_flags, load_config, to_run_config

FIELDS = ["--config.backend.keep_G=False", "--config.model.matmul_precision=default"]
MODULE = """
def scaled(q, k, v, i, f, chunk_size=None):
    assert q.shape == k.shape and i.shape == f.shape == v.shape[:3]
    return v * (i * f)[..., None]
"""


@pytest.fixture(scope="module", autouse=True)
def config_flags():
    define_config_flags(FIELDS)


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    """Runs the `main` of the tool, as for a user in `tmp_path`."""
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words):
        with flagsaver.flagsaver():
            tool.main(flags.FLAGS(["benchmark", "--repeats=1", *words]))

    return run


def test_backends_and_an_external_function(tmp_path, benchmark, monkeypatch, capsys):
    monkeypatch.setattr(backends, "measure_matmul_rate", lambda *args, **kwargs: 3e9)
    (tmp_path / "their_mlstm.py").write_text(MODULE)
    benchmark(
        "--backends=fwbw,recurrent",
        "--implementations=auto,xla",
        "--shapes=1x2x8x4x6,1x2x3x4x6",
        "--chunk_sizes=4",
        "--external=their_mlstm:scaled",
        "--dtype=bfloat16",
        *FIELDS,
        "--json=figures.json",
    )
    output = capsys.readouterr().out
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert os.listdir(tmp_path).count("figures.json.tmp") == 0
    # A chunk of 4 does not fit into 3 tokens.
    names = ("shape", "backend", "implementation", "chunk_size")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("1x2x8x4x6", "fwbw", "xla", 4),
        ("1x2x8x4x6", "recurrent", "", None),
        ("1x2x8x4x6", "their_mlstm:scaled", "", 4),
        ("1x2x3x4x6", "recurrent", "", None),
    ]
    assert "fwbw xla" in output
    assert rows[0]["options"]["keep_G"] is False
    figures = ("median_ms", "min_ms", "compile_s", "matmul_fraction", "ratio_to_first")
    for row in rows:
        assert row["dtype"] == "bfloat16" and row["device"] and row["jax_version"]
        assert row["matmul_precision"] == "default"
        assert row["matmul_rate_gflop_per_s"] == 3
        for name in ("forward", "forward_backward"):
            assert all(row[f"{name}_{figure}"] > 0 for figure in figures)
            assert row[f"{name}_temporary_memory_mib"] >= 0
        assert row["shape"] in output
        assert f"{row['forward_median_ms']:.2f}" in output


def test_train_step(tmp_path):
    """Runs the tool as a user in `tmp_path` would."""
    words = ["--train_step", "--config=smoke", "--config.model.num_blocks=1", "--json=step.json"]
    result = subprocess.run(
        [sys.executable, "-m", tool.__name__, "--repeats=1", *words],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "BUILD_WORKING_DIRECTORY": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "step.json").read_text())
    assert row.pop("config") == "smoke"
    assert row.pop("program").startswith("mLSTM: XLA program")
    assert row.pop("device") and row.pop("jax_version")
    assert row.pop("matmul_precision") == "highest"
    assert "peak_device_memory_mib" not in row  # A CPU does not count it.
    assert min(row.values()) > 0
    assert f"{row['parameters']:,}" in result.stdout


def test_the_memory_of_a_device_is_that_of_the_step_and_not_of_the_yardstick(monkeypatch):
    order = []

    def note(name, value):
        return lambda *args, **kwargs: order.append((name, *args)) or value

    state = collections.namedtuple("State", ["params"])({"w": jax.numpy.ones(3)})
    step = jax.jit(lambda state, batch: (state, {"loss": batch.inputs.sum()}))
    monkeypatch.setattr(train_step, "create_training", lambda *args: (state, None, step))
    monkeypatch.setattr(train_step, "peak_device_bytes", note("memory", 3 * 2**20))
    monkeypatch.setattr(train_step, "measure_matmul_rate", note("matmul", 1e9))
    config = to_run_config(load_config("smoke"))
    figures = train_step.time_train_step(config, 1, lambda: None)
    assert figures["peak_device_memory_mib"] == 3
    assert order == [("memory",), ("matmul", config.model.compute_dtype, config.model.precision)]


@pytest.mark.parametrize(
    "words, named",
    [
        (["--backends=fwbv"], "'fwbv' is unknown; expected one of fwbw, parallel_stabilized"),
        (["--shapes=1x4x8x4"], "--shapes=1x4x8x4: expected five sizes"),
        (["--chunk_sizes=64,-1"], "--chunk_sizes=-1: expected a whole number"),
        (["--shapes=1x1x8x4x4", "--chunk_sizes=16"], "nothing to time for --shapes=1x1x8x4x4"),
        (["--backends="], "nothing to time"),
        (["--implementations=triton"], "'triton' is unknown; expected one of auto, xla, mosaic"),
        (["--implementations=mosaic,xla"], "mosaic cannot be used: it needs a Hopper GPU"),
        (["--peers=flax"], "--peers=flax is unknown; expected mlstm_kernels"),
        (["--peers=mlstm_kernels"], "--peers=mlstm_kernels needs the packages torch, triton and"),
        (["--dtype=float8"], "--dtype=float8: value should be one of <float32|bfloat16>"),
        (["--external=no_such_module:f"], "--external=no_such_module:f: the module cannot be"),
        (["--json=none/x.json"], "--json=none/x.json: expected a file in a folder that exists"),
        (["--train_step", "--dtype=float32"], "--dtype is for backends and has no effect with"),
        (["--simulate_devices=2"], "--simulate_devices needs --train_step"),
        (["fwbw"], "unexpected arguments: fwbw"),
    ],
    ids=str,
)
def test_bad_input(tmp_path, benchmark, capfd, words, named):
    with pytest.raises((ValueError, flags.Error)) as caught:
        benchmark(*words)
    assert named in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert not os.listdir(tmp_path)
