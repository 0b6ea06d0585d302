"""Tests of the gate statistics that a step logs."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from xlstm.dataset.batch import Batch
from xlstm.distributed.data_parallel import shard_parameters, sum_gradients
from xlstm.distributed.mesh import BATCH_AXES, MeshConfig, create_mesh
from xlstm.distributed.single_gpu import accumulate_gradients
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import LanguageModelConfig, ModelConfig
from xlstm.models.xlstm_parallel.xlstm_lm_model import xLSTMLMModel
from xlstm.trainer.llm.gate_statistics import gate_moments, gate_scalars
from xlstm.trainer.llm.loss import loss_metrics

_B, _T, _V, _BLOCKS = 8, 8, 16, 4
_CAP = 15.0


def _setup(num_devices, model_options, **mesh):
    """Returns a mesh, a model and boxed parameters on the host, far from their initial values."""
    mesh_config = MeshConfig(**{"dp": 1} | mesh)
    mesh = create_mesh(mesh_config, jax.devices()[:num_devices])
    sizes = {
        "vocab_size": _V,
        "embedding_dim": 16,
        "num_blocks": _BLOCKS,
        "num_heads": 2,
        "ffn_round_up_to_multiple_of": 8,
        "dropout": 0.1,
    }
    config = ModelConfig(**sizes | model_options)
    model = xLSTMLMModel(LanguageModelConfig(config, BackendConfig(chunk_size=4), mesh_config))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    return mesh, model, shard_parameters(params, mesh.shape["fsdp"], min_weight_size=16)


def _batch():
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, _V, (_B, _T + 1)).astype(np.int32)
    mask, reset = rng.random((_B, _T)) < 0.7, rng.random((_B, _T)) < 0.2
    keys = jax.random.split(jax.random.PRNGKey(2), _B)
    return Batch(tokens[:, :-1], tokens[:, 1:], mask, reset), keys


def _run(compute, mesh, params, out_specs):
    """Calls `compute(params, batch)` inside `shard_map`."""
    in_specs = (nn.get_partition_spec(params), P(BATCH_AXES))
    run = jax.shard_map(compute, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    run = jax.jit(run)
    return jax.device_get(run(params, _batch()))


def _forward(num_devices=8, model_options=None, **sizes):
    """Returns the metrics of a batch."""
    mesh, model, params = _setup(num_devices, model_options or {}, **sizes)

    def compute(params, batch):
        pattern = model.config.model.pattern
        metrics, _ = loss_metrics(params, model.apply, *batch, gate_pattern=pattern)
        return lax.psum(metrics, mesh.axis_names)

    return _run(compute, mesh, params, P())


@functools.cache
def _step(gate_statistics):
    """Returns gradients and metrics of a step with sharding, accumulation and rematerialization."""
    mesh, model, params = _setup(8, {"remat": "block"}, fsdp=2, pp=2, tp=2)
    pattern = model.config.model.pattern if gate_statistics else None

    def compute(params, batch):
        num_targets = lax.psum(jnp.sum(batch[0].targets_mask, dtype=jnp.float32), BATCH_AXES)

        def loss_fn(params, apply_fn, batch, rng):
            metrics, _ = loss_metrics(params, apply_fn, *batch, gate_pattern=pattern)
            return 2 * metrics["loss"][0] / num_targets, (metrics, None)

        grads, metrics, _ = accumulate_gradients(
            types.SimpleNamespace(params=params, apply_fn=model.apply),
            batch,
            jax.random.key(0),
            2,
            loss_fn,
            use_scan=True,
        )
        return sum_gradients(grads, mesh.axis_names), lax.psum(metrics, mesh.axis_names)

    return _run(compute, mesh, params, (nn.get_partition_spec(params), P()))


@functools.cache
def _expected():
    """Returns the statistics that NumPy computes from the captured pre-activations, and ours."""
    _, model, params = _setup(1, {})
    names = ("igate_preact", "fgate_preact", "ogate_preact")
    batch, keys = _batch()

    @jax.jit
    def apply(params):
        _, variables = model.apply(
            {"params": params},
            *(batch.inputs, batch.targets, batch.targets_mask, batch.reset, keys),
            method="next_token_nll",
            mutable=["intermediates"],
            capture_intermediates=lambda module, method: module.name in names,
        )
        return variables, gate_moments(variables, model.config.model.pattern)

    variables, moments = jax.device_get(apply(params))
    captured = variables["intermediates"]["blocks"]["mlstm_layer"]
    i, f, o = (np.asarray(captured[name]["__call__"][0], np.float64) for name in names)
    assert i.shape == (_BLOCKS, _B, _T, 2)
    gates = {"igate": _CAP * np.tanh(i / _CAP), "fgate": _CAP * np.tanh(f / _CAP)}
    gates["ogate"] = 1 / (1 + np.exp(-o))
    row = {}
    for name, gate in gates.items():
        for block in range(_BLOCKS):
            row[f"{name}_mean/{block}"] = gate[block].mean()
            row[f"{name}_std/{block}"] = gate[block].std()
    return row, gate_scalars(moments)


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_row_is_what_numpy_makes_of_the_pre_activations():
    expected, found = _expected()
    _assert_same(found, expected)
    assert all(type(value) is float for value in found.values())
    # Every block and gate has other values, so mixing them up would be noticed.
    assert len({round(value, 4) for value in expected.values()}) == len(expected)


@pytest.mark.parametrize(
    "sizes",
    [{"dp": 2, "fsdp": 2, "tp": 2, "tp_overlap": True}, {"dp": 2, "pp": 4, "num_microbatches": 2}],
    ids=str,
)
def test_statistics_are_those_of_the_global_batch_on_every_mesh(sizes):
    _assert_same(gate_scalars(_forward(**sizes)["gates"]), _expected()[0])


def test_statistics_are_those_of_the_global_batch_in_a_training_step():
    _, metrics = _step(True)
    _assert_same(gate_scalars(metrics["gates"]), _expected()[0])


def test_asking_changes_neither_loss_nor_gradient():
    (grads, metrics), (expected, plain) = _step(True), _step(False)
    assert metrics.keys() - plain.keys() == {"gates"}
    np.testing.assert_allclose(metrics["loss"], plain["loss"], rtol=1e-6)

    global_norm = np.sqrt(sum(np.sum(np.square(grad)) for grad in jax.tree.leaves(expected)))

    def check(found, expected):
        # The two programs round differently.
        error = np.linalg.norm(found - expected)
        assert error < 1e-6 * (np.linalg.norm(expected) + global_norm)

    jax.tree.map(check, grads, expected)


def test_a_gate_that_does_not_move_has_no_deviation():
    count, mean = np.ones(3), np.full(3, -10, np.float32)
    row = gate_scalars({"igate": (count, mean, np.nextafter(mean**2, np.float32(0)))})
    assert [row[f"igate_std/{block}"] for block in range(3)] == [0, 0, 0]
    assert row["igate_mean/2"] == -10


def test_a_mixed_stack_has_statistics_of_every_block():
    options = {"ratio": "[1:1]", "block": "xlstm_2024"}
    expected = gate_scalars(_forward(1, options)["gates"])
    _assert_same(gate_scalars(_forward(8, options, fsdp=2, pp=2, tp=2)["gates"]), expected)
    assert {f"igate_mean/{block}" for block in range(_BLOCKS)} < expected.keys()
    assert len({round(value, 4) for value in expected.values()}) == len(expected)
    # The output gates of sLSTM blocks are sigmoids.
    assert all(0 < expected[f"ogate_mean/{block}"] < 1 for block in (1, 3))
