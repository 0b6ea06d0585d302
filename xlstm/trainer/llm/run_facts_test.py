"""Tests of the facts about a run."""

import dataclasses
import platform
import sys
import types

import jax
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.data import open_data
from xlstm.dataset.testing import write_store
from xlstm.dataset.validation import stores_of
from xlstm.trainer.base.coordinator import describe_difference
from xlstm.trainer.llm import run_facts as module
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.run_facts import (
    code_version,
    config_facts,
    data_facts,
    device_facts,
    environment_facts,
    package_versions,
    source_digests,
)


def test_packages_and_python_are_named():
    version = code_version()
    assert version["jax"] == jax.__version__
    assert version["python"] == platform.python_version()
    assert {"xlstm", "commit", "flax", "optax", "orbax-checkpoint"} <= version.keys()


def test_packages_that_are_not_there_are_named_too(monkeypatch):
    monkeypatch.setattr(module, "_OTHER_PACKAGES", ("numpy", "no-such-package"))
    versions = package_versions()
    assert versions["jax"] == jax.__version__ and versions["numpy"]
    assert versions["no-such-package"] is None


def test_every_loaded_module_of_ours_has_a_digest_of_its_source(tmp_path, monkeypatch):
    folder = tmp_path / "xlstm" / "trainer" / "llm"
    folder.mkdir(parents=True)
    (folder / "run_facts.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(folder / "run_facts.py"))
    for name, path in {"ours": folder / "a.py", "other": tmp_path / "b.py"}.items():
        path.write_text("x = 1\n")
        loaded = types.ModuleType(name)
        loaded.__file__ = str(path)
        monkeypatch.setitem(sys.modules, name, loaded)
    before = source_digests()
    assert list(before) == ["xlstm/trainer/llm/a.py", "xlstm/trainer/llm/run_facts.py"]
    assert source_digests() == before
    (folder / "a.py").write_text("x = 2\n")
    assert source_digests() != before


def test_every_field_of_the_configuration_is_a_fact():
    config = RunConfig()
    (facts,) = config_facts(config).values()
    sections = dataclasses.asdict(config)
    assert len(facts) == sum(len(fields) for fields in sections.values())
    assert facts["data.batch_size"] == config.data.batch_size
    changed = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=7))
    assert describe_difference(config_facts(config), config_facts(changed), 1).startswith(
        "process 1 has data.seed=7, process 0 has data.seed=0: "
    )


def test_the_environment(monkeypatch):
    before = environment_facts()
    assert environment_facts() == before
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/mine --xla_b=2 --xla_a=1")
    facts = environment_facts()
    assert facts["give all processes the same environment"]["XLA_FLAGS"] == "--xla_a=1 --xla_b=2"
    packages = facts["install the same packages for all processes"]
    assert {"python", "jax", "jaxlib", "numpy"} <= {name for name in packages if packages[name]}
    assert "xlstm/trainer/llm/run_facts.py" in facts["give all processes the same code"]


def test_devices():
    (facts,) = device_facts().values()
    assert facts["devices"].endswith(" x cpu")


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "store", ["x = 1\n" * 100])
    return str(tmp_path / "store")


def _data_facts(data):
    return data_facts(data, [*data.stores, *stores_of(data.validation_sets())])


def test_the_files_of_all_stores_are_facts(store):
    config = DataConfig(
        stores=(store,), validation_stores=(f"more={store}",), validation_fraction=0.0
    )
    (facts,) = _data_facts(open_data(config, "")).values()
    assert facts.keys() >= {f"{store}/tokens.bin", f"{store}/documents.bin", "tokenizer"}
    config = DataConfig(stores=("stdlib",), validation_fraction=0.0)
    assert f"{store}/tokens.bin" in str(_data_facts(open_data(config, store)))


def test_a_task_is_a_fact():
    config = DataConfig(task="parity")
    (facts,) = _data_facts(open_data(config, "")).values()
    assert facts["checksums"] == ["task parity"]
