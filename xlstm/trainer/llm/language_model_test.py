"""Tests of runs that start from the parameters of another run."""

import math
import os
import shutil

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from xlstm.common_types import TrainState
from xlstm.dataset.config import DataConfig
from xlstm.dataset.testing import write_store, write_tokenizer_json
from xlstm.dataset.tokenizer import load_tokenizer
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.find_checkpoint import find_checkpoint
from xlstm.trainer.llm.language_model import init_from_checkpoint
from xlstm.trainer.llm.prepare_run import prepare_run
from xlstm.trainer.llm.workdir import Workdir, write_config

_SHAPES = {"head": (4, 8), "stack": (4, 8)}


def _state(value, average=None, shapes=_SHAPES, **sizes):
    """Returns a new state whose parameters start at a value."""
    mesh = create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])

    def params(value):
        def place(name, *names):
            array = np.arange(math.prod(shapes[name]), dtype=np.float32).reshape(shapes[name])
            placed = jax.device_put(array + value, NamedSharding(mesh, P(*names)))
            return nn.Partitioned(placed, names)

        return {"head": place("head", "tp", "fsdp"), "stack": place("stack", "pp", "fsdp")}

    scalar = jax.numpy.zeros((), int)
    return TrainState(
        step=scalar,
        apply_fn=None,
        params=params(value),
        tx=None,
        opt_state={"momentum": jax.numpy.full(3, value)},
        rng=jax.random.PRNGKey(value),
        params_ema=None if average is None else params(average),
        grad_norm_mean=scalar,
        skipped_steps=scalar,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with two checkpoints each; the tokenizer of one is known."""
    folder = tmp_path_factory.mktemp("runs")
    for name, tokenizer in (("plain", "byte"), ("averaged", None)):
        info = {"tokenizer": tokenizer}
        with Checkpointer(str(folder / name / "checkpoints"), run_info=info) as checkpointer:
            average = None if name == "plain" else 5
            checkpointer.save(2, _state(1, average))
            checkpointer.save(3, _state(2, average))
    return folder


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 2, "pp": 2, "tp": 2}], ids=str)
@pytest.mark.parametrize(
    "path, value",
    [("plain", 2), ("plain/checkpoints/2", 1), ("averaged", 5), ("averaged/checkpoints/3", 5)],
)
@pytest.mark.parametrize("average", [None, 9])
def test_only_the_parameters_are_taken(runs, path, value, average, sizes):
    expected = jax.device_get(unboxed(_state(value).params))
    before = _state(7, average, **sizes)
    shardings = jax.tree.map(lambda x: x.sharding, before.params)
    state = init_from_checkpoint(*find_checkpoint(str(runs / path)), before)
    assert jax.tree.map(lambda x: x.sharding, state.params) == shardings
    trees = [state.params] if average is None else [state.params, state.params_ema]
    for tree in trees:
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(unboxed(tree)), expected)
    assert (state.params_ema is None) == (average is None)
    np.testing.assert_array_equal(state.opt_state["momentum"], np.full(3, 7))
    np.testing.assert_array_equal(state.rng, jax.random.PRNGKey(7))
    if average is not None:
        # Each has its own buffer, since a training step donates both.
        jax.tree.map(lambda x: x.delete(), state.params)
        jax.tree.map(np.asarray, state.params_ema)
    # The previous parameters were freed.
    assert all(x.is_deleted() for x in jax.tree.leaves(before.params))


def test_another_model(runs):
    message = r"step 3 in .*plain.*: params.head is of shape \(4, 8\) in .* \(4, 16\)"
    with pytest.raises(OSError, match=message):
        wider = _state(7, shapes=_SHAPES | {"head": (4, 16)})
        init_from_checkpoint(*find_checkpoint(str(runs / "plain")), wider)


def _prepare(store, workdir, init_from):
    """Prepares a run; returns its configuration and the run."""
    data = DataConfig(stores=(store.path,), validation_fraction=0.0)
    config = RunConfig(
        model=ModelConfig(vocab_size=300), data=data, trainer=TrainerConfig(init_from=init_from)
    )
    return config, prepare_run(config, str(workdir), allow_config_change=False)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A token store of bytes, and one of another tokenizer."""
    folder, texts = tmp_path_factory.mktemp("stores"), ["x = 1\n" * 40] * 10
    words = load_tokenizer(write_tokenizer_json(folder / "tokenizer.json"))
    return {
        "byte": write_store(folder / "bytes", texts),
        "words": write_store(folder / "words", texts, words),
    }


@pytest.mark.parametrize(
    "store, path, step",
    [
        ("byte", "plain", 3),
        ("byte", "plain/checkpoints/2", 2),
        ("byte", "averaged", 3),
        # That model's tokenizer is not known.
        ("words", "averaged", 3),
    ],
)
def test_what_a_new_run_begins_from(runs, stores, tmp_path, store, path, step):
    _, run = _prepare(stores[store], tmp_path / "new", str(runs / path))
    assert run.source == (Workdir(str(runs / path.split("/")[0])), step)


@pytest.mark.parametrize(
    "store, path, message",
    [
        ("byte", "nowhere", "nowhere does not exist: expected the folder of a run"),
        ("byte", "plain/checkpoints/4", "4 does not exist: the run has the checkpoints"),
        (
            "words",
            "plain",
            r"another tokenizer \(.*json, .* ids, .*, sha256:.*\) than .* \(byte, 256 ids\).*--tok",
        ),
    ],
)
def test_what_no_run_begins_from(runs, stores, tmp_path, store, path, message):
    with pytest.raises(ValueError, match=message):
        _prepare(stores[store], tmp_path / "new", str(runs / path))
    assert not (tmp_path / "new").exists()


def test_a_run_that_has_begun_needs_its_source_no_more(runs, stores, tmp_path):
    begun = Workdir(str(tmp_path / "begun"))
    source = shutil.copytree(runs / "plain", tmp_path / "source")
    _, run = _prepare(stores["byte"], begun.path, str(source))
    assert run.source
    os.makedirs(os.path.join(begun.checkpoints, "50"))
    write_config(begun, run.config, run.data.checksums)
    shutil.rmtree(source)
    _, run = _prepare(stores["byte"], begun.path, str(source))
    assert run.source is None


def test_parameters_that_are_not_finite(runs):
    folder = runs / "ruined"
    with Checkpointer(str(folder / "checkpoints"), run_info={"tokenizer": None}) as checkpointer:
        state = _state(1)
        ruined = jax.tree.map(lambda x: x * math.nan, state.params)
        checkpointer.save(1, state.replace(params=ruined))
    message = r"no run can start from the checkpoint of step 1 .* NaN: 32 in head, "
    with pytest.raises(ValueError, match=message):
        init_from_checkpoint(*find_checkpoint(str(folder)), _state(7))
