"""Tests of configurations and config files."""

import dataclasses
import json
import math
import typing

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from xlstm.dataset.config import DataConfig
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.tools.config import (
    check_field,
    config_names,
    config_path,
    default_config,
    field_comments,
    load_config,
    sections,
    to_run_config,
)
from xlstm.trainer.base.param_utils import get_num_params, get_param_mask_fn, path_name, unboxed
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.workdir import Workdir, load_run_config, write_config

# Every config that comes with the project, and the number of its parameters.
_NUM_PARAMS = {
    "smoke": 42_224,
    "stdlib_tiny": 923_296,
    "xlstm:125M": 162_303_840,
    "xlstm:400M": 406_856_896,
    "xlstm:1.4B": 1_420_839_104,
    "xlstm:7B": 6_865_424_896,
    # The paper has 163.8M, 409.3M, 840.4M and 1422.6M.
    "xlstm_2024:125M": 163_806_144,
    "xlstm_2024:350M": 409_290_112,
    "xlstm_2024:760M": 840_427_392,
    "xlstm_2024:1.3B": 1_422_559_616,
    "task:parity": 87_042,
    "task:recall:20": 92_162,
}


def _fields():
    return [
        (section, field.name)
        for section, section_class in sections().items()
        for field in dataclasses.fields(section_class)
    ]


def _values(section, field, value):
    """Returns the default configuration, as dictionaries, with another value of one field."""
    values = default_config().to_dict()
    values[section][field] = value
    return values


def _init(config):
    """Returns the shapes of a model's parameters."""
    init = xLSTMLMModel(config).init
    return jax.eval_shape(init, jax.random.PRNGKey(0), jnp.zeros((1, 1), jnp.int32))["params"]


def test_the_sections():
    assert list(sections()) == [
        "model",
        "backend",
        "mesh",
        "data",
        "optimizer",
        "schedule",
        "trainer",
        "logger",
    ]


def test_the_default_is_that_of_the_dataclasses():
    assert to_run_config(default_config()) == RunConfig()


def test_changed_fields_arrive():
    config = default_config()
    config.model.embedding_dim = 64
    config.mesh.tp = 2
    config.data.stores = ("a", "b")
    config.trainer.seed = 5
    run_config = to_run_config(config)
    assert run_config.model.embedding_dim == 64
    assert run_config.mesh.tp == 2
    assert run_config.data.stores == ("a", "b")
    assert run_config.trainer.seed == 5


@pytest.mark.parametrize(
    "section, field, given, expected",
    [
        ("data", "stores", ["a", "b"], ("a", "b")),
        ("data", "weights", [1, 2.5], (1.0, 2.5)),
        ("schedule", "peak_lr", 1, 1.0),
        ("optimizer", "weight_decay_exclude", [], ()),
    ],
)
def test_values_are_brought_to_their_types(section, field, given, expected):
    values = _values(section, field, given)
    if field == "weights":
        values["data"]["stores"] = ["a", "b"]
    value = getattr(getattr(to_run_config(values), section), field)
    assert value == expected
    assert jax.tree.map(type, value) == jax.tree.map(type, expected)


@pytest.mark.parametrize(
    "section, field, given, message",
    [
        ("model", "num_blocks", 2.0, r"model\.num_blocks=2\.0: expected int"),
        ("model", "num_blocks", True, r"model\.num_blocks=True: expected int"),
        ("model", "num_blocks", "2", r"model\.num_blocks='2': expected int"),
        ("model", "dtype", 32, r"model\.dtype=32: expected str"),
        ("schedule", "peak_lr", "high", r"schedule\.peak_lr='high': expected float"),
        ("schedule", "peak_lr", True, r"schedule\.peak_lr=True: expected float"),
        ("logger", "tensorboard", 1, r"logger\.tensorboard=1: expected bool"),
        ("data", "stores", "a", r"data\.stores='a': expected a tuple"),
        ("data", "stores", [3], r"data\.stores\[0\]=3: expected str"),
        ("data", "stores", None, r"data\.stores=None: expected a tuple"),
        # Rejected by the section itself.
        ("model", "dtype", "float16", r"model\.dtype='float16'"),
        ("backend", "name", "fw", r"backend\.name='fw' is unknown; expected one of fwbw"),
    ],
)
def test_wrong_values(section, field, given, message):
    with pytest.raises(ValueError, match=message):
        to_run_config(_values(section, field, given))


@pytest.mark.parametrize("section, field", _fields())
def test_every_field_is_checked(section, field):
    """No field takes just anything, and none may be missing."""
    values = _values(section, field, object())
    with pytest.raises(ValueError, match=rf"{section}\.{field}=<object"):
        to_run_config(values)
    del values[section][field]
    with pytest.raises(ValueError, match=rf"config\.{section} .*missing: {field}\)"):
        to_run_config(values)


@pytest.mark.parametrize(
    "section, field",
    [
        (section, field)
        for section, field in _fields()
        if typing.get_type_hints(sections()[section])[field] in (float, tuple[float, ...])
    ],
)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_every_number_must_be_finite(section, field, number):
    is_tuple = isinstance(default_config()[section][field], tuple)
    values = _values(section, field, (number,) if is_tuple else number)
    named = rf"^{section}\.{field}(\[0\])?={number}: it must be a finite number$"
    with pytest.raises(ValueError, match=named):
        to_run_config(values)


def test_unknown_and_missing_names():
    values = default_config().to_dict()
    values["model"]["embeding_dim"] = values["model"].pop("embedding_dim")
    with pytest.raises(
        ValueError, match=r"config\.model .*unknown: embeding_dim; missing: embedding_dim"
    ):
        to_run_config(values)
    with pytest.raises(ValueError, match="the config .*unknown: moddel; missing: none"):
        to_run_config(default_config().to_dict() | {"moddel": {}})
    without = default_config().to_dict()
    del without["mesh"]
    with pytest.raises(ValueError, match="the config .*unknown: none; missing: mesh"):
        to_run_config(ConfigDict(without))


@pytest.mark.parametrize("section", [None, 3, "model"])
def test_a_section_that_is_none(section):
    with pytest.raises(ValueError, match=r"model"):
        to_run_config(default_config().to_dict() | {"model": section})


@pytest.mark.parametrize("given", [None, 3, [], "smoke"])
def test_what_is_no_config(given):
    with pytest.raises(ValueError, match="the config=.*: expected a section"):
        to_run_config(given)


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.embeding_dim", r"did you mean model\.embedding_dim\?"),
        ("trainer.num_step", r"did you mean trainer\.num_steps\?"),
        ("model", "there is no such field"),
        ("zzz.qqq", "show_config lists the fields"),
    ],
)
def test_unknown_fields_of_flags(name, message):
    with pytest.raises(ValueError, match=rf"config\.{name}: .*{message}|{message}"):
        check_field(name)


def test_known_fields_of_flags():
    for section, field in _fields():
        check_field(f"{section}.{field}")


@pytest.mark.parametrize("section, field", _fields())
def test_every_field_has_a_comment(section, field):
    comment = field_comments(sections()[section])[field]
    assert len(comment) > 10, f"{section}.{field}"
    assert "#" not in comment


def test_comments():
    @dataclasses.dataclass
    class Section:
        """Of one: 1  # which is no field."""

        one: int = 1  # The first.
        # Over two lines.
        two: tuple[str, ...] = (
            "a",  # Inside the value.
        )
        three: int = 3

        def __post_init__(self):
            self.one = 2  # No field either.

        @property
        def four(self):
            return self.three  # Nor this.

    assert field_comments(Section) == {
        "one": "The first. Over two lines.",
        "two": "Inside the value.",
        "three": "",
    }


def test_the_table_below_names_every_config():
    names = {name.partition(":")[0] for name in _NUM_PARAMS}
    assert sorted(names | {"finetune"}) == config_names()  # That one takes any model.


@pytest.mark.parametrize("name, num_params", _NUM_PARAMS.items())
def test_configs_that_come_with_the_project(name, num_params):
    config = to_run_config(load_config(name))
    assert get_num_params(_init(config.language_model)) == num_params


@pytest.mark.parametrize("ratio", ["", "[1:1]", "[0:1]"])
@pytest.mark.parametrize("block", ["xlstm_7b", "xlstm_2024"])
def test_weight_decay_is_for_what_multiplies_activations(block, ratio):
    params = _init(LanguageModelConfig(ModelConfig(block=block, ratio=ratio)))
    exclude = RunConfig().optimizer.weight_decay_exclude
    mask = get_param_mask_fn(exclude, may_be_missing=exclude)(params)
    decayed = {
        path_name(path): is_decayed
        for path, is_decayed in jax.tree_util.tree_leaves_with_path(unboxed(mask))
    }
    assert len(decayed) > 10
    for name, is_decayed in decayed.items():
        assert is_decayed == (name.rpartition(".")[2] in ("kernel", "recurrent")), name


def test_a_config_without_its_argument_says_which_there_are():
    with pytest.raises(ValueError, match="the sizes are 125M, 400M, 1.4B, 7B"):
        load_config("xlstm")
    with pytest.raises(ValueError, match="xlstm_2024:: the sizes are 125M, 350M, 760M, 1.3B"):
        load_config("xlstm_2024")
    with pytest.raises(ValueError, match="8B.*the sizes are"):
        load_config("xlstm:8B")


def _workdir(folder):
    """Creates a run's folder, whose checkpoints hold at most a million bytes of parameters."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "parameters").write_bytes(bytes(1_000_000))
    return Workdir(str(folder))


def test_fine_tuning_takes_the_model_of_a_run(tmp_path, monkeypatch):
    source = RunConfig(
        model=ModelConfig(vocab_size=300, qk_dim_factor=1.0, dtype="bfloat16"),
        backend=BackendConfig("recurrent", chunk_size=8),
        data=DataConfig(context_length=77),
    )
    run = tmp_path / "runs" / "mine"
    write_config(_workdir(run), source, ["abc"])
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    for argument in ("runs/mine", "runs/mine/checkpoints/50", str(run)):
        config = to_run_config(load_config(f"finetune:{argument}"))
        assert (config.model, config.backend) == (source.model, source.backend)
        assert config.trainer.init_from == str(tmp_path / argument)
        assert config.data == DataConfig()
        assert config.schedule.peak_lr < RunConfig().schedule.peak_lr


@pytest.mark.parametrize(
    "argument, message",
    [("", "name the folder of a run"), (":/no/run", "/no/run/config.json is missing")],
)
def test_fine_tuning_without_a_run(argument, message):
    with pytest.raises(ValueError, match=message):
        load_config(f"finetune{argument}")


def test_paths_of_configs(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
    assert config_path("mine.py") == str(tmp_path / "mine.py")
    assert config_path("./mine.py:arg") == str(tmp_path / "mine.py:arg")
    assert config_path(str(tmp_path / "mine.py")) == str(tmp_path / "mine.py")
    assert config_path("smoke").endswith("configs/smoke.py")
    with pytest.raises(ValueError, match="--config=smok: .*configs by name are .*smoke"):
        config_path("smok")


_BEGIN = """from xlstm.tools.config import default_config

def get_config(dim='64'):
    c = default_config()
"""


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "mine.py has no function get_config"),
        ("def get_config(:", "mine.py.*SyntaxError"),
        ("import no_such_module", "mine.py:1: ModuleNotFoundError: .*no_such_module"),
        ("def get_config():\n    return 1 / 0\n", "mine.py:2: ZeroDivisionError"),
        ("def get_config(size):\n    return size\n", "mine.py: TypeError: .*size"),
        (_BEGIN + "    c.model.dmi = 3\n", "mine.py:5: .*dmi"),
        (_BEGIN + "    c.model.dtype = 3\n", "mine.py:5: TypeError"),
        (_BEGIN + "    c.modell.dtype = 3\n", "mine.py:5: .*modell.*[Dd]id you mean.*model"),
    ],
)
def test_config_files_that_fail(tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_config(str(tmp_path / "mine.py"))
    message = str(caught.value).replace(str(tmp_path), "")  # As long as the folder's name is.
    assert "\n" not in message and len(message) < 400


def test_a_config_file_with_an_argument(tmp_path):
    text = _BEGIN + "    c.model.embedding_dim = int(dim)\n    return c\n"
    (tmp_path / "mine.py").write_text(text)
    path = str(tmp_path / "mine.py")
    assert to_run_config(load_config(path)).model.embedding_dim == 64
    assert to_run_config(load_config(f"{path}:32")).model.embedding_dim == 32


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_blocks", 10**6, "num_blocks=1000000 with embedding_dim=128 is too large"),
        ("embedding_dim", 10**9, "embedding_dim=1000000000 is too large"),
        ("vocab_size", 10**12, "vocab_size=1000000000000 with embedding_dim=128 is too large"),
        ("ffn_proj_factor", 1e308, "ffn_proj_factor=1e[+]308 with embedding_dim=128 is too large"),
        ("num_blocks", "4", "model.num_blocks='4': expected int"),
        ("num_blocks", None, "model.num_blocks=None: expected int"),
        ("num_blocks", [4], r"model.num_blocks=\[4\]: expected int"),
        ("num_blocks", -(10**400), "model.num_blocks=-1"),
        ("norm_eps", 10**400, "model.norm_eps=1000.*: expected float"),
        ("norm_eps", float("nan"), "model.norm_eps=nan: it must be a finite number"),
        ("dtype", "\x1b[2J", r"model.dtype='\\x1b\[2J' is unknown"),
    ],
)
def test_the_configuration_of_a_stranger(tmp_path, field, value, message):
    workdir = _workdir(tmp_path)
    write_config(workdir, RunConfig(), ["abc"])
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["config"]["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=f"config.json is not the configuration .*{message}"):
        load_run_config(workdir)


@pytest.mark.parametrize(
    "config", [None, [], "x", {"model": []}, {"data": 3}, {"model": {"name": 1}}, {"new": {}}]
)
def test_a_configuration_of_another_shape(tmp_path, config):
    workdir = _workdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ValueError, match="config.json is not the configuration of a run: "):
        load_run_config(workdir)
