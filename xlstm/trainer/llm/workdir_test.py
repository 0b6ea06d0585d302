import dataclasses
import json
import os

import pytest

from xlstm.trainer.checkpoints.folder import CheckpointFolder, CheckpointMetadata
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.find_checkpoint import find_checkpoint, split_checkpoint_path
from xlstm.trainer.llm.workdir import (
    Workdir,
    check_workdir,
    inherited_fields,
    lock_workdir,
    with_new_fields,
    write_config,
)


def _changed(**sections):
    """Returns the default configuration with other values, given as `section={field: value}`."""
    config = RunConfig()
    for section, fields in sections.items():
        section_config = dataclasses.replace(getattr(config, section), **fields)
        config = dataclasses.replace(config, **{section: section_config})
    return config


@pytest.fixture
def claimed(tmp_path):
    """The folder of a run with the default configuration."""
    workdir = Workdir(str(tmp_path / "runs" / "mine"))
    _claim(workdir, RunConfig())
    return workdir


def _claim(workdir, config, corpora=("abc",), allow=False):
    """Does what a run does with its folder before the first step."""
    decay_steps = inherited_fields(workdir, config).get("schedule.decay_steps", 0)
    config = config.with_fields({"schedule.decay_steps": decay_steps} if decay_steps else {})
    config = config.with_decay_steps()
    check_workdir(workdir, config, list(corpora), allow_config_change=allow)
    with lock_workdir(workdir):
        write_config(workdir, config, list(corpora))


def _saved(workdir):
    with open(workdir.config, encoding="utf-8") as file:
        return json.load(file)


def test_a_new_folder_is_made_and_holds_the_configuration(claimed):
    assert os.listdir(claimed.path) == ["config.json"]
    saved = _saved(claimed)
    assert saved["config"]["model"]["embedding_dim"] == RunConfig().model.embedding_dim
    assert saved["config"]["data"]["stores"] == ["stdlib"]
    assert saved["config"].keys() == dataclasses.asdict(RunConfig()).keys()


def test_everything_lies_in_the_folder():
    workdir = Workdir("/runs/mine")
    assert workdir.config == "/runs/mine/config.json"
    assert workdir.metrics == "/runs/mine/metrics.jsonl"
    assert workdir.loss_plot == "/runs/mine/loss.png"
    assert workdir.checkpoints == "/runs/mine/checkpoints"


def test_the_same_configuration_goes_on(claimed):
    before = _saved(claimed)
    _claim(claimed, RunConfig())
    assert _saved(claimed) == before


@pytest.mark.parametrize(
    "sections",
    [
        {"mesh": {"dp": 1, "tp": 4}},
        {"backend": {"chunk_size": 32, "implementation": "xla"}},
        {"logger": {"interval": 3, "tensorboard": False, "sample_prompt": "def"}},
        {"trainer": {"num_steps": 7}},
        {"trainer": {"num_minibatches": 2, "eval_interval": 5}},
        {"trainer": {"checkpoint_interval": 9, "max_checkpoints": 1}},
        {"trainer": {"nan_policy": "skip", "keep_best_checkpoint": True}},
        {"data": {"validation_stores": ("wiki=/data/wiki",)}},
    ],
    ids=str,
)
def test_what_may_differ_is_written_anew(claimed, sections):
    config = _changed(**sections)
    _claim(claimed, config)
    plain = json.loads(json.dumps(sections))  # With lists for tuples.
    for section, fields in plain.items():
        assert fields.items() <= _saved(claimed)["config"][section].items()


@pytest.mark.parametrize(
    "sections, named",
    [
        ({"model": {"embedding_dim": 64}}, "model.embedding_dim was 128, is 64"),
        (
            {"backend": {"stabilize_correctly": False}},
            "backend.stabilize_correctly was True, is False",
        ),
        ({"data": {"stores": ("a", "b")}}, "data.stores was ['stdlib'], is ['a', 'b']"),
        ({"data": {"batch_size": 32}}, "data.batch_size was 16, is 32"),
        ({"optimizer": {"beta2": 0.99}}, "optimizer.beta2 was 0.95, is 0.99"),
        ({"trainer": {"seed": 3}}, "trainer.seed was 0, is 3"),
        ({"trainer": {"init_from": "/run"}}, "trainer.init_from was '', is '/run'"),
    ],
    ids=str,
)
def test_what_may_not_differ_is_named(claimed, sections, named):
    before = _saved(claimed)
    config = _changed(**sections)
    with pytest.raises(ValueError, match="--allow_config_change") as caught:
        _claim(claimed, config)
    assert f"({named})" in str(caught.value)
    assert claimed.path in str(caught.value)
    assert _saved(claimed) == before
    _claim(claimed, config, allow=True)
    assert _saved(claimed) != before
    _claim(claimed, config)  # The run now has this configuration.


def test_all_differences_are_named_and_only_those(claimed):
    config = _changed(model={"num_blocks": 2}, optimizer={"beta1": 0.8}, trainer={"num_steps": 5})
    with pytest.raises(ValueError) as caught:
        _claim(claimed, config)
    assert "(model.num_blocks was 4, is 2; optimizer.beta1 was 0.9, is 0.8)" in str(caught.value)


# The schedule of `claimed` rises to 0.001 in 100 steps, and then falls.
@pytest.mark.parametrize(
    "steps_done, schedule, is_alike",
    [
        (0, {"peak_lr": 0.5}, True),
        (1, {"peak_lr": 0.5}, True),  # The learning rate of the first step is 0.
        (2, {"peak_lr": 0.5}, False),
        (100, {"decay_steps": 5000, "decay": "exponential"}, True),
        (101, {"decay_steps": 5000, "decay": "exponential"}, True),
        (102, {"decay_steps": 5000, "decay": "exponential"}, False),
        (1000, {"cooldown_steps": 50}, True),
        (1002, {"cooldown_steps": 50}, False),
    ],
    ids=str,
)
def test_a_schedule_may_differ_in_what_is_to_come(claimed, steps_done, schedule, is_alike):
    os.makedirs(os.path.join(claimed.checkpoints, str(steps_done)))
    config = _changed(schedule=schedule)
    if is_alike:
        _claim(claimed, config)
        return
    with pytest.raises(ValueError, match=r"\(schedule\.\w+ was "):
        _claim(claimed, config)


def test_another_text_under_the_same_name(claimed):
    with pytest.raises(ValueError, match="the token stores hold other text"):
        _claim(claimed, RunConfig(), corpora=["def"])
    _claim(claimed, RunConfig(), corpora=["def"], allow=True)
    _claim(claimed, RunConfig(), corpora=["def"])


def _rewrite(workdir, change):
    saved = _saved(workdir)
    change(saved["config"])
    with open(workdir.config, "w", encoding="utf-8") as file:
        json.dump(saved, file)


def test_a_field_that_is_newer_than_the_run_had_its_default(claimed):
    _rewrite(claimed, lambda config: config["model"].pop("scan_unroll"))
    _claim(claimed, RunConfig())
    _rewrite(claimed, lambda config: config["model"].pop("scan_unroll"))
    with pytest.raises(ValueError, match=r"model\.scan_unroll was 1, is 2"):
        _claim(claimed, _changed(model={"scan_unroll": 2}))


_FORMER_EXCLUDE = ("bias", "norm", "embeddings")
_FORMER = {
    "data.shuffle": "grain",
    "model.matmul_precision": "default",
    "optimizer.weight_decay_exclude": _FORMER_EXCLUDE,
}


@pytest.fixture
def begun_before(claimed):
    """The folder of a run from before two of today's fields and today's weight decay."""

    def change(config):
        del config["data"]["shuffle"], config["model"]["matmul_precision"]
        config["optimizer"]["weight_decay_exclude"] = list(_FORMER_EXCLUDE)

    _rewrite(claimed, change)
    return claimed


def test_a_run_keeps_the_defaults_that_it_began_with(begun_before):
    kept = inherited_fields(begun_before, RunConfig())
    assert kept == _FORMER | {"schedule.decay_steps": 1000}
    config = RunConfig().with_fields(kept)
    assert (config.data.shuffle, config.model.matmul_precision) == ("grain", "default")
    assert config.optimizer.weight_decay_exclude == _FORMER_EXCLUDE
    _claim(begun_before, config)
    # The folder now has all fields, and the same command resumes again.
    saved = _saved(begun_before)["config"]
    assert saved["data"]["shuffle"] == "grain"
    assert inherited_fields(begun_before, RunConfig()) == kept


@pytest.mark.parametrize(
    "section, field, value, named",
    [
        ("data", "shuffle", "grain", None),
        ("optimizer", "weight_decay_exclude", _FORMER_EXCLUDE, None),
        (
            "optimizer",
            "weight_decay_exclude",
            ("bias",),
            "weight_decay_exclude was ['bias', 'norm', 'embeddings'], is ['bias']",
        ),
        ("data", "seed", 1, "data.seed was 0, is 1"),
    ],
)
def test_what_the_user_says_otherwise_is_as_ever(begun_before, section, field, value, named):
    config = _changed(**{section: {field: value}})
    kept = inherited_fields(begun_before, config)
    assert kept.keys() - {"schedule.decay_steps"} == _FORMER.keys() - {f"{section}.{field}"}
    config = config.with_fields(kept)
    if named is None:
        _claim(begun_before, config)
        return
    with pytest.raises(ValueError) as caught:
        _claim(begun_before, config)
    assert f"{named})" in str(caught.value)


def test_a_run_of_today_keeps_nothing(claimed, tmp_path):
    assert inherited_fields(claimed, RunConfig().with_decay_steps()) == {}
    assert inherited_fields(Workdir(str(tmp_path / "new")), RunConfig()) == {}
    with open(claimed.config, "w", encoding="utf-8") as file:
        file.write("{")
    assert inherited_fields(claimed, RunConfig()) == {}


def test_a_decay_that_follows_the_run_stays_where_it_was_when_the_run_resumes(claimed):
    longer = _changed(trainer={"num_steps": 3000})
    assert longer.with_decay_steps().schedule.decay_steps == 3000
    kept = inherited_fields(claimed, longer)
    assert kept == {"schedule.decay_steps": 1000}
    _claim(claimed, longer.with_fields(kept))
    explicit = longer.with_fields({"schedule.decay_steps": 2000})
    assert inherited_fields(claimed, explicit) == {}


def test_what_the_absence_of_a_field_meant(claimed):
    _rewrite(claimed, lambda config: config["data"].pop("shuffle"))
    config = with_new_fields(_saved(claimed)["config"])
    assert config["data"] == _saved(claimed)["config"]["data"] | {"shuffle": "grain"}
    assert config["optimizer"] == _saved(claimed)["config"]["optimizer"]


def test_a_run_from_before_chunk_sizes_of_the_device_takes_them_in_silence(claimed):
    def change(config):
        del config["backend"]["implementation"]
        config["backend"]["chunk_size"] = 64

    _rewrite(claimed, change)
    before = with_new_fields(_saved(claimed)["config"])["backend"]
    assert (before["chunk_size"], before["implementation"]) == (64, "auto")
    assert inherited_fields(claimed, RunConfig().with_decay_steps()) == {}
    _claim(claimed, RunConfig())
    after = _saved(claimed)["config"]["backend"]
    assert (after["chunk_size"], after["implementation"]) == (-1, "auto")


def test_a_field_that_there_is_no_more_is_named(claimed):
    _rewrite(claimed, lambda config: config["trainer"].update(former_option=True))
    with pytest.raises(ValueError, match=r"trainer\.former_option was True, is None"):
        _claim(claimed, RunConfig())


_GARBAGE = r"config\.json (is not the configuration of a|cannot be read|holds no JSON object)"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"config": 3, "corpora": []}', '{"config": {"model": 1}}']
)
def test_garbage_is_refused_and_left_alone(claimed, content):
    with open(claimed.config, "w", encoding="utf-8") as file:
        file.write(content)
    with pytest.raises(ValueError, match=_GARBAGE):
        _claim(claimed, RunConfig())
    with open(claimed.config, encoding="utf-8") as file:
        assert file.read() == content


def test_binary_garbage_is_refused(claimed):
    with open(claimed.config, "wb") as file:
        file.write(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=_GARBAGE):
        _claim(claimed, RunConfig())


@pytest.mark.parametrize("left", ["metrics.jsonl", "checkpoints/10"])
def test_a_run_without_its_configuration_is_refused(tmp_path, left):
    (tmp_path / left).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a run without its config\.json"):
        _claim(Workdir(str(tmp_path)), RunConfig(), allow=True)
    assert os.listdir(tmp_path) == [left.split("/")[0]]


def test_a_run_that_was_killed_before_it_wrote_anything_begins_anew(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    _claim(Workdir(str(tmp_path)), RunConfig())
    assert sorted(os.listdir(tmp_path)) == ["checkpoints", "config.json"]


def test_other_files_in_the_folder_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    _claim(Workdir(str(tmp_path)), RunConfig())
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "notes.txt"]


def test_a_folder_has_one_owner_at_a_time(claimed):
    with lock_workdir(claimed):
        other_name = claimed.path + "-too"
        os.symlink(claimed.path, other_name)
        for path in (claimed.path, other_name):
            with pytest.raises(OSError, match="another process is training in"):
                with lock_workdir(Workdir(path)):
                    pass
    with lock_workdir(claimed):
        pass
    assert os.listdir(claimed.path) == ["config.json"]


@pytest.mark.parametrize("allow", [False, True])
def test_a_model_without_a_run_is_left_alone(tmp_path, allow):
    workdir = Workdir(str(tmp_path))
    write_config(workdir, RunConfig(), [])
    before = _saved(workdir)
    with pytest.raises(ValueError, match="no run to resume: start one in another --workdir"):
        _claim(workdir, RunConfig(), allow=allow)
    assert _saved(workdir) == before


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/runs/mine", ("/runs/mine", None)),
        ("/runs/mine/checkpoints/50", ("/runs/mine", 50)),
        ("/runs/mine/checkpoints/50/", ("/runs/mine", 50)),
        ("/runs/50", ("/runs/50", None)),
        ("/runs/mine/checkpoints/٣", ("/runs/mine/checkpoints/٣", None)),
        ("/runs/mine/checkpoints/1e3", ("/runs/mine/checkpoints/1e3", None)),
        ("/runs/mine/checkpoints", ("/runs/mine/checkpoints", None)),
    ],
)
def test_what_the_folder_of_a_checkpoint_stands_for(path, expected):
    workdir, step = split_checkpoint_path(path)
    assert (workdir.path, step) == expected


def test_a_run_may_be_called_as_a_checkpoint_is(tmp_path):
    path = tmp_path / "checkpoints" / "5"
    (path / "checkpoints").mkdir(parents=True)
    assert split_checkpoint_path(str(path)) == (Workdir(str(path)), None)


def test_the_corpus_can_be_checked_later(claimed):
    check_workdir(claimed, RunConfig().with_decay_steps())
    with pytest.raises(ValueError, match="the token stores hold other text"):
        check_workdir(claimed, RunConfig().with_decay_steps(), ["def"])


def _save(workdir, **confirmed):
    folder = CheckpointFolder(workdir.checkpoints)
    for name, is_confirmed in confirmed.items():
        step = int(name[1:])
        folder.begin(step)
        folder.finalize(step, {}, CheckpointMetadata(confirmed=is_confirmed))


def test_the_last_confirmed_checkpoint_is_found(claimed):
    reports = []
    _save(claimed, _3=True, _5=True, _8=False, _9=False)
    assert find_checkpoint(claimed.path, reports.append) == (claimed, 5)
    (report,) = reports
    newest = os.path.join(claimed.checkpoints, "9")
    assert report.startswith(f"{newest} is not confirmed") and "step 5 is used" in report
    assert find_checkpoint(newest, reports.append) == (claimed, 9)
    assert len(reports) == 1


def test_an_unconfirmed_checkpoint_is_used_by_its_own_name_only(claimed):
    _save(claimed, _3=False)
    with pytest.raises(ValueError, match="no confirmed checkpoint. .*/3 is not .*: name it to use"):
        find_checkpoint(claimed.path)
    assert find_checkpoint(os.path.join(claimed.checkpoints, "3")) == (claimed, 3)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "checkpoints", "checkpoints/5"])
def test_a_checkpoint_that_lies_elsewhere_is_refused(tmp_path, name):
    workdir = Workdir(str(tmp_path / "run"))
    _save(workdir, _5=True)
    write_config(workdir, RunConfig(), ["abc"])
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert find_checkpoint(workdir.path)[1] == 5
    os.rename(tmp_path / "run" / name, tmp_path / "elsewhere")
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link that leads out of"):
        find_checkpoint(workdir.path)


def test_a_step_beyond_all_schedules_is_no_reason_to_compare_each(claimed):
    os.makedirs(os.path.join(claimed.checkpoints, "9" * 18))
    _claim(claimed, _changed(trainer={"num_steps": 5}))
    with pytest.raises(ValueError, match="schedule.peak_lr was"):
        _claim(claimed, _changed(schedule={"peak_lr": 0.5}))


def test_checkpoints_that_are_a_link_to_elsewhere_are_refused_at_the_start(claimed, tmp_path):
    (tmp_path / "scratch").mkdir()
    os.symlink(tmp_path / "scratch", claimed.checkpoints)
    with pytest.raises(ValueError, match="checkpoints is a link that leads out of"):
        _claim(claimed, RunConfig())
    os.symlink(claimed.path, tmp_path / "whole")
    os.remove(claimed.checkpoints)
    _claim(Workdir(str(tmp_path / "whole")), RunConfig())
