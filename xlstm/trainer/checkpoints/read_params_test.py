import json
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
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.checksums import write_checksums
from xlstm.trainer.checkpoints.read_params import open_params, read_params

_SHAPES = {"head": (3, 8), "stack": (4, 8)}


def _params(offset, **sizes):
    """Returns parameters with a stack of four blocks, which may be sharded over stages."""
    mesh = create_mesh(MeshConfig(**sizes), None if sizes else jax.devices()[:1])

    def place(name, *names):
        array = np.arange(math.prod(_SHAPES[name]), dtype=np.float32).reshape(_SHAPES[name])
        return nn.Partitioned(jax.device_put(array + offset, NamedSharding(mesh, P(*names))), names)

    return {"head": place("head", None, "fsdp"), "stack": place("stack", "pp", "fsdp")}


@pytest.fixture(scope="module")
def states():
    """States by step: without an average, with one, and on a mesh with stages."""
    few = {"apply_fn": None, "tx": None, "opt_state": {}, "rng": jax.random.PRNGKey(0)}
    few["step"] = jax.numpy.zeros((), int)
    few |= {"grad_norm_mean": few["step"], "skipped_steps": few["step"]}
    return {
        1: TrainState(params=_params(0), **few),
        2: TrainState(params=_params(0), params_ema=_params(1), **few),
        3: TrainState(params=_params(2, fsdp=4, pp=2), **few),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory, states):
    directory = str(tmp_path_factory.mktemp("checkpoints"))
    with Checkpointer(directory, max_to_keep=9) as checkpointer:
        for step, state in states.items():
            checkpointer.save(step, state)
    return directory


def _expected(state):
    params = state.params if state.params_ema is None else state.params_ema
    return jax.device_get(unboxed(params))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_parameters_or_their_average(directory, states, step):
    expected, like = _expected(states[step]), states[3].params
    params = read_params(directory, step, like)
    assert jax.tree.map(lambda x: x.sharding, params) == jax.tree.map(lambda x: x.sharding, like)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(unboxed(params)), expected)
    opened = open_params(directory, step, _SHAPES)
    assert list(opened) == list(_SHAPES)
    for name, array in opened.items():
        np.testing.assert_array_equal(array.read().result(), expected[name])


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_block_of_a_stack_can_be_read_alone(directory, step):
    chunks = open_params(directory, step, _SHAPES)["stack"].chunk_layout.read_chunk.shape
    assert chunks[0] == 1


def test_what_cannot_be_read(directory, states, tmp_path):
    with pytest.raises(OSError, match="there is no checkpoint of step 7"):
        open_params(directory, 7, _SHAPES)
    with pytest.raises(OSError, match=r"params.stack is of shape \(4, 8\) in .* \(4, 9\)"):
        open_params(directory, 1, _SHAPES | {"stack": (4, 9)})
    with pytest.raises(OSError, match="params.more is missing in the checkpoint"):
        open_params(directory, 1, _SHAPES | {"more": (1,)})
    shutil.copytree(os.path.join(directory, "1"), tmp_path / "1")
    os.truncate(next((tmp_path / "1").rglob("d/*")), 1)
    for read, wanted in ((open_params, _SHAPES), (read_params, states[3].params)):
        with pytest.raises(OSError, match="has 1 bytes, not the"):
            read(str(tmp_path), 1, wanted)


def test_arrays_in_folders_of_their_names_are_not_looked_for(directory, states, tmp_path):
    """Orbax would read an absolute name as a folder anywhere on the disk."""
    shutil.copytree(directory, tmp_path / "c")
    path = tmp_path / "c" / "1" / "state" / "_METADATA"
    metadata = json.loads(path.read_text())
    assert metadata["use_ocdbt"] is True
    path.write_text(json.dumps(metadata | {"use_ocdbt": False}))
    write_checksums(str(tmp_path / "c" / "1"))
    with pytest.raises(OSError, match="step 1 .* cannot be used: .* no OCDBT store"):
        read_params(str(tmp_path / "c"), 1, states[1].params)
