"""Tests that rows continue their documents from batch to batch, on one device and on meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.common_types import PyTree
from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import initial_state, xLSTMLMModel
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm import language_model
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh, global_batches
from xlstm.trainer.optimizer.schedule import ScheduleConfig

_B, _T, _PIECES, _V = 8, 16, 3, 32
_MODELS = {
    "xlstm_7b": {},
    "xlstm_2024": {"block": "xlstm_2024"},
    "mixed": {"block": "xlstm_2024", "ratio": "[1:1]"},
}
_MESHES = {
    "one device": {},
    "cp": {"cp": 2, "tp": 2, "fsdp": 2},
    "pipeline": {"pp": 2, "cp": 2, "dp": 2, "num_microbatches": 2, "num_minibatches": 2},
}


def _config(model="mixed", *, carry_state=True, context_length=_T, num_minibatches=1, **mesh):
    return RunConfig(
        model=ModelConfig(
            vocab_size=_V,
            embedding_dim=16,
            num_blocks=4,
            num_heads=4,
            ffn_round_up_to_multiple_of=8,
            remat="dots",
            **_MODELS[model],
        ),
        backend=BackendConfig(chunk_size=8),
        mesh=MeshConfig(**{"dp": 1, "fsdp_min_weight_size": 64} | mesh),
        data=DataConfig(
            context_length=context_length,
            batch_size=_B,
            shuffle="contiguous",
            carry_state=carry_state,
        ),
        schedule=ScheduleConfig(peak_lr=0.1, warmup_steps=1, decay_steps=100),
        trainer=TrainerConfig(num_minibatches=num_minibatches),
    )


def _rows():
    """Returns a batch of long rows, with documents that end in, at and next to the seams."""
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.5, (_B, _PIECES * _T + 1)).astype(np.int32) % _V
    reset = rng.random((_B, _PIECES * _T)) < 0.05
    reset[1, _T], reset[2, _T - 1], reset[3, _T + 1] = True, True, True
    return Batch(tokens[:, :-1], tokens[:, 1:], rng.random(reset.shape) < 0.9, reset)


def _pieces():
    rows = _rows()
    return [
        jax.tree.map(lambda x, first=first: x[:, first : first + _T], rows)
        for first in range(0, _PIECES * _T, _T)
    ]


@functools.lru_cache
def _training(config):
    """Returns the mesh, the initial state on the host, its shardings, and the compiled step."""
    devices = 8 if max(config.mesh.sizes.values()) > 1 else 1
    mesh = create_run_mesh(config) if devices > 1 else create_mesh(config.mesh, jax.devices()[:1])
    state, _, train_step = language_model.create_training(config, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return mesh, jax.device_get(state), shardings, train_step


def _train(config, batches, state=None):
    """Returns the sums of the losses, and the state after the last step."""
    mesh, initial, shardings, train_step = _training(config)
    state, sums = jax.device_put(initial if state is None else state, shardings), []
    for batch in global_batches(batches, mesh):
        state, metrics = train_step(state, batch)
        sums.append(jax.device_get(metrics["loss"]))
    return np.array(sums), state


def _without_learning(config):
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, peak_lr=1e-30))


@pytest.mark.parametrize("model", _MODELS)
def test_pieces_have_the_loss_of_the_whole(model):
    whole = _config(model, carry_state=False, context_length=_PIECES * _T)
    expected, _ = _train(_without_learning(whole), [_rows()])
    found, state = _train(_without_learning(_config(model)), _pieces())
    np.testing.assert_allclose(found.sum(axis=0), expected[0], rtol=1e-6)
    # The rows end where decoding the whole ends.
    config = whole.language_model
    zeros = initial_state(config, _B)
    _, last = xLSTMLMModel(config).apply(
        {"params": unboxed(jax.device_get(state.params))}, _rows().inputs, _rows().reset, zeros
    )
    _assert_close(_in_order(config.model, state.carried_state), last, 1e-4)


def test_without_the_state_pieces_are_other_documents():
    found, _ = _train(_without_learning(_config("xlstm_7b")), _pieces())
    alone, _ = _train(_without_learning(_config("xlstm_7b", carry_state=False)), _pieces())
    np.testing.assert_allclose(alone[0], found[0], rtol=1e-6)
    assert np.all(np.abs(alone[1:, 0] / found[1:, 0] - 1) > 1e-4)


def _in_order(model, carried):
    """Returns carried states as `xLSTMLMModel` returns those of decoding."""
    blocks = carried["blocks"]
    if model.pattern.is_uniform:
        return blocks["state"]
    return {group.split("_", 1)[1]: variables["state"] for group, variables in blocks.items()}


def _assert_close(found: PyTree, expected: PyTree, rtol: float) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(x - y) <= rtol * (np.linalg.norm(y) + 1e-3)


@pytest.mark.parametrize("name", ["cp", "pipeline"])
def test_every_mesh_carries_the_same_state(name):
    expected, of_one = _train(_config(), _pieces())
    found, state = _train(_config(**_MESHES[name]), _pieces())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    _assert_close(jax.device_get(state.carried_state), jax.device_get(of_one.carried_state), 1e-3)
    _assert_close(
        jax.device_get(unboxed(state.params)), jax.device_get(unboxed(of_one.params)), 1e-3
    )
    assert expected[-1][0] / expected[-1][1] < 0.99 * expected[0][0] / expected[0][1]


def test_a_checkpoint_carries_the_state_to_another_mesh(tmp_path):
    expected, _ = _train(_config(), _pieces())
    _, state = _train(_config(**_MESHES["cp"]), _pieces()[:2])
    with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
        checkpointer.save(2, state)
    for name in ("one device", "pipeline"):
        config = _config(**_MESHES[name])
        _, initial, shardings, _ = _training(config)
        with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
            state = checkpointer.restore(jax.device_put(initial, shardings))
        found, _ = _train(config, _pieces()[2:], state)
        np.testing.assert_allclose(found, expected[2:], rtol=1e-5, err_msg=name)
    # A run without a carried state reads it too, and the other way round.
    config = _config(carry_state=False)
    _, initial, shardings, _ = _training(config)
    with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
        state = checkpointer.restore(jax.device_put(initial, shardings))
        assert state.carried_state is None
        checkpointer.save(3, state)
        _, initial, shardings, _ = _training(_config())
        state = checkpointer.restore(jax.device_put(initial, shardings))
    assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(state.carried_state)))


def test_gradients_end_at_the_batch():
    """A carried state has the gradient of a constant."""
    config = _config()
    model, mesh = xLSTMLMModel(config.language_model), _training(config)[0]
    params = unboxed(_training(config)[1].params)
    before = _train(_without_learning(config), _pieces()[:1])[1].carried_state
    batch = _pieces()[1]

    def loss(params, before):
        variables = {"params": params, "carried_state": before}
        tokens = batch.inputs, batch.targets, batch.targets_mask, batch.reset
        (nll, _), after = model.apply(
            variables, *tokens, method="next_token_nll", mutable=["carried_state"]
        )
        return nll, after["carried_state"]

    with jax.set_mesh(mesh):
        by_params, _ = jax.grad(loss, has_aux=True)(params, before)
        through = jax.grad(
            lambda params: sum(jnp.sum(x) for x in jax.tree.leaves(loss(params, before)[1]))
        )(params)
    assert all(np.any(g) for g in jax.tree.leaves(by_params))
    assert not any(np.any(g) for g in jax.tree.leaves(through))


def test_a_row_whose_state_is_not_finite_starts_over():
    _, state = _train(_config(), _pieces()[:1])
    leaves, structure = jax.tree.flatten(jax.device_get(state.carried_state))
    spoilt = [np.array(x) for x in leaves]
    spoilt[0][1, 5] = np.nan
    state = jax.device_get(state).replace(carried_state=jax.tree.unflatten(structure, spoilt))
    batch = _pieces()[1]
    # Nothing resets the row, and its gradient spoils the step, which is skipped.
    batch = batch.replace(reset=np.zeros_like(batch.reset))
    _, after = _train(_config(), [batch], state)
    assert int(after.skipped_steps) == 1
    for x in jax.tree.leaves(jax.device_get(after.carried_state)):
        assert np.all(np.isfinite(x)) and not np.any(x[:, 5]) and np.any(x[:, 4])


def test_states_are_created_where_they_belong():
    config = _config(**_MESHES["cp"])
    mesh, initial, shardings, _ = _training(config)
    created = CarriedState.of_run(config).create(mesh)
    jax.tree.map(np.testing.assert_array_equal, created, initial.carried_state)
    of_created = jax.tree.map(lambda x: x.sharding, created)
    assert jax.tree.leaves(of_created) == jax.tree.leaves(shardings.carried_state)
    assert CarriedState.of_run(_config(carry_state=False)) is None
