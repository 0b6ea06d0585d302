"""Tests of the flag `--config` and of the flags of fields."""

import pytest
from absl import flags

from xlstm.tools.config import (
    DEFAULT_CONFIG,
    config_name,
    config_path,
    define_config_flags,
    run_config,
)


@pytest.fixture
def parse(monkeypatch):
    """A function from a command line to the configuration, with flags of its own."""

    def parse(*words):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        values(["tool", *define_config_flags(list(words))])
        return run_config()

    return parse


def _write_mine(folder, old="", new=""):
    """Writes the config `smoke` with a changed text as `mine.py`; returns its path."""
    with open(config_path("smoke"), encoding="utf-8") as file:
        text = file.read()
    assert old in text
    (folder / "mine.py").write_text(text.replace(old, new) if old else text + new)
    return str(folder / "mine.py")


def test_the_default(parse):
    assert parse().model.embedding_dim == 128
    assert config_name() == DEFAULT_CONFIG == "stdlib_tiny"


@pytest.mark.parametrize(
    "words",
    [["--config=smoke"], ["--config", "smoke"], ["-config=smoke"], ["-config", "smoke"]],
    ids=str,
)
def test_a_config_by_its_name(parse, words):
    assert parse(*words).model.embedding_dim == 32
    assert config_name() == "smoke"


def test_fields_are_changed_by_flags(parse):
    config = parse(
        "--config=smoke",
        "--config.model.embedding_dim=64",
        "--config.schedule.peak_lr=2e-3",
        "--config.schedule.warmup_steps",
        "3",
        "--config.backend.name=recurrent",
        "--config.logger.tensorboard=False",
        "--config.data.stores=('/a', '/b')",
        "--config.data.weights=(1.0, 2.5)",
    )
    assert config.model.embedding_dim == 64
    assert config.model.num_blocks == 2
    assert config.schedule.peak_lr == 2e-3
    assert config.schedule.warmup_steps == 3
    assert config.backend.name == "recurrent"
    assert config.logger.tensorboard is False
    assert config.data.stores == ("/a", "/b")
    assert config.data.weights == (1.0, 2.5)


def test_the_config_may_come_behind_its_fields(parse):
    config = parse("--config.model.embedding_dim=64", "--config=smoke")
    assert (config.model.embedding_dim, config.model.num_blocks) == (64, 2)


def test_a_whole_number_for_a_float(parse):
    assert parse("--config.optimizer.grad_clip_norm=2").optimizer.grad_clip_norm == 2.0


def test_one_store_with_and_without_parentheses(parse):
    assert parse("--config.data.stores=/a").data.stores == ("/a",)
    assert parse("--config.data.stores=('/a',)").data.stores == ("/a",)


@pytest.mark.parametrize(
    "words, stores",
    [
        (["--config.data.stores=/a", "--config.data.stores=/b"], ("/b",)),
        (["--config.data.stores", "/a", "--config.data.stores", "/b"], ("/b",)),
        (["-config.data.stores=/a", "--config.data.stores", "/b"], ("/b",)),
        (["--config.data.stores=('/a', '/b')", "-config.data.stores", "/c"], ("/c",)),
        (["--config.data.stores=/a", "--config.data.stores=('/b', '/c')"], ("/b", "/c")),
        (["--config.data.stores=['/a', '/b']"], ("/a", "/b")),
        (["--config.data.stores='/a','/b'"], ("/a", "/b")),
        (["--config.data.stores=/a", "--config.data.stores=('/b,c',)"], ("/b,c",)),
        (["--config.data.stores='/a,b'"], ("/a,b",)),
        (["--config.data.stores=stdlib", "--config.trainer.seed=1"], ("stdlib",)),
    ],
    ids=str,
)
def test_the_last_tuple_wins(parse, words, stores):
    assert parse("--config=smoke", *words).data.stores == stores


def test_other_tuples_are_left_alone(parse):
    config = parse(
        "--config.data.ramp_steps=9",
        "--config.data.ramp_batch_sizes=(4, 8)",
        "--config.data.ramp_steps=(5, 6)",
        "--config.optimizer.weight_decay_exclude=bias",
        "--config.optimizer.muon_exclude=()",
    )
    assert config.data.ramp_steps == (5, 6) and config.data.ramp_batch_sizes == (4, 8)
    assert config.optimizer.weight_decay_exclude == ("bias",)
    assert config.optimizer.muon_exclude == ()


def test_a_flag_replaces_the_tuple_of_a_file(parse, tmp_path):
    change = "    config.data.stores = ('/x', '/y')\n    return config"
    path = _write_mine(tmp_path, "    return config", change)
    assert parse(f"--config={path}").data.stores == ("/x", "/y")
    words = [f"--config={path}", "--config.data.stores=/a"]
    assert parse(*words).data.stores == ("/a",)
    assert parse(*words, "--config.data.stores=/b").data.stores == ("/b",)


def test_a_path_starts_where_the_user_is(parse, monkeypatch, tmp_path):
    _write_mine(tmp_path, "embedding_dim = 32", "embedding_dim = 96")
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    assert parse("--config=mine.py").model.embedding_dim == 96
    assert config_name() == "mine"


def test_paths_in_the_config_start_where_the_user_is(parse, monkeypatch):
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", "/home/someone")
    config = parse(
        "--config.data.stores=('stdlib', 'data/a', '/data/b')",
        "--config.data.validation_stores=('c=../c', 'd=/data/d')",
        "--config.trainer.init_from=runs/mine",
    )
    assert config.data.stores == ("stdlib", "/home/someone/data/a", "/data/b")
    assert config.data.validation_stores == ("c=/home/c", "d=/data/d")
    assert config.trainer.init_from == "/home/someone/runs/mine"
    assert parse().trainer.init_from == ""


def test_an_argument_is_part_of_the_name(parse):
    assert parse("--config=xlstm:125M").model.embedding_dim == 768
    assert config_name() == "xlstm_125M"


@pytest.mark.parametrize(
    "argument, name", [("../runs/mine/", "mine_runs_mine"), ("/runs/a.b", "mine_runs_a.b")]
)
def test_a_path_as_an_argument_makes_the_name_of_a_folder(parse, tmp_path, argument, name):
    path = _write_mine(tmp_path, "get_config()", "get_config(path)")
    parse(f"--config={path}:{argument}")
    assert config_name() == name


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config=smok"], "--config=smok: there is no file"),
        (["--config", "smok"], "--config=smok: there is no file"),
        (["--config=xlstm:9B"], "the sizes are"),
        (["--config.model.embeding_dim=3"], r"did you mean model\.embedding_dim"),
        (["--config.moddel.embedding_dim", "3"], r"did you mean model\.embedding_dim"),
    ],
    ids=str,
)
def test_bad_words(words, message):
    with pytest.raises(ValueError, match=message):
        define_config_flags(words)


def test_other_words_are_left_alone(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    words = define_config_flags(["--workdir=config", "--configs=x", "smoke", "--config=smoke"])
    assert words == ["--workdir=config", "--configs=x", "smoke"]


def test_a_config_file_is_run_once(parse, tmp_path):
    log = tmp_path / "log"
    path = _write_mine(tmp_path, new=f"\nopen({str(log)!r}, 'a').write('.')\n")
    parse(f"--config={path}", "--config.model.embedding_dim=64")
    assert log.read_text() == "."
