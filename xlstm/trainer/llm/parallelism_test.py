"""Tests that every mesh trains as one device does, and communicates only what theory expects.

Parameters, loss, gradients and loss curve are compared. `parallelism_full_test` adds more meshes,
each with and without accumulation.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from xlstm.common_types import PyTree, TrainState
from xlstm.dataset.batch import Batch
from xlstm.dataset.config import DataConfig
from xlstm.distributed.hlo_collectives import find_collectives
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.models.xlstm_parallel.blocks.mlstm.backend.config import BackendConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.param_utils import unboxed
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.llm import language_model
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.data import create_run_mesh, global_batches
from xlstm.trainer.llm.expected_collectives import expected_collectives
from xlstm.trainer.optimizer.schedule import ScheduleConfig

_B, _T, _V = 32, 16, 96  # Nothing else has size 96.
_STEPS, _QUICK_STEPS = 20, 8
_MESHES = [
    {"dp": 8},
    {"fsdp": 8},
    {"pp": 8},
    {"tp": 8},
    {"fsdp": 2, "pp": 2, "tp": 2},
    {"dp": 2, "fsdp": 2, "pp": 2},
    {"dp": 2, "pp": 2, "tp": 2, "num_microbatches": 4},
    {"fsdp": 2, "tp": 4},
    {"dp": 2, "fsdp": 2, "tp": 2},
    {"fsdp": 4, "pp": 2},
    {"pp": 2, "tp": 4},
    {"dp": 4, "fsdp": 2},
    {"fsdp": 2, "pp": 2, "tp": 2, "tp_overlap": True, "num_microbatches": 1},
    {"cp": 8},
    {"dp": 2, "cp": 4},
    {"fsdp": 4, "cp": 2},
    {"pp": 4, "cp": 2},
    {"cp": 2, "tp": 4},
    {"dp": 2, "fsdp": 2, "cp": 2},
    {"fsdp": 2, "cp": 2, "tp": 2},
    {"fsdp": 2, "pp": 2, "cp": 2, "num_microbatches": 4},
    {"pp": 2, "cp": 2, "tp": 2},
    {"cp": 4, "tp": 2, "tp_overlap": True},
]


def _config(
    num_minibatches=1,
    block="xlstm_7b",
    dropout=0.0,
    remat="dots",
    dtype="float32",
    ratio="",
    context_length=_T,
    **mesh,
):
    return RunConfig(
        model=ModelConfig(
            block=block,
            vocab_size=_V,
            embedding_dim=32,
            ratio=ratio,
            num_blocks=8,
            num_heads=8,
            ffn_round_up_to_multiple_of=8,
            dropout=dropout,
            remat=remat,
            dtype=dtype,
        ),
        # Smaller chunks double the rounding of xlstm_2024, on every mesh.
        backend=BackendConfig(chunk_size=4 if block == "xlstm_7b" else 8),
        mesh=MeshConfig(**{"dp": 1, "fsdp_min_weight_size": 64} | mesh),
        data=DataConfig(context_length=context_length, batch_size=_B),
        schedule=ScheduleConfig(warmup_steps=5, decay_steps=100),
        trainer=TrainerConfig(num_minibatches=num_minibatches),
    )


@functools.lru_cache
def _batches(context_length=_T):
    """Returns batches with documents of all lengths and with padding, which fills some rows.

    The first rows are full. In three, documents begin before, at or behind every seam between 8
    parts of the row; in another, no document begins.
    """
    batches, positions = [], np.arange(context_length)
    for seed in range(_STEPS):
        rng = np.random.default_rng(seed)
        tokens = rng.zipf(1.5, (_B, context_length + 1)).astype(np.int32) % _V
        lengths = rng.integers(0, 2 * context_length, (_B, 1))
        lengths[:4] = context_length
        mask = positions < lengths
        reset = rng.random((_B, context_length)) < 0.2
        for row, offset in enumerate((-1, 0, 1)):
            reset[row] = (positions - offset) % (context_length // 8) == 0
        reset[3] = False
        batches.append(Batch(tokens[:, :-1], tokens[:, 1:], mask, reset))
    return batches


def _recording_gradients(optimizer):
    """Returns the optimizer, with the last gradients added to its state."""

    def update(grads, state, params):
        updates, inner = optimizer.update(grads, state[1], params)
        return updates, (grads, inner)

    return optax.GradientTransformation(
        lambda params: (optax.tree.zeros_like(params), optimizer.init(params)), update
    )


@dataclasses.dataclass
class _Run:
    """A compiled training step and its initial state, from which training can start repeatedly."""

    config: RunConfig
    mesh: jax.sharding.Mesh
    initial: TrainState  # On the host.
    shardings: PyTree
    train_step: jax.stages.Compiled

    def fresh_state(self):
        return jax.device_put(self.initial, self.shardings)

    def batches(self, start, stop):
        return _batches(self.config.data.context_length)[start:stop]


@functools.lru_cache
def _prepare(config, num_devices=8):
    if num_devices == 1:
        mesh = create_mesh(config.mesh, jax.devices()[:1])
    else:
        mesh = create_run_mesh(config)
    create_optimizer = language_model.create_optimizer
    language_model.create_optimizer = lambda *args: _recording_gradients(create_optimizer(*args))
    try:
        state, _, train_step = language_model.create_training(config, mesh)
    finally:
        language_model.create_optimizer = create_optimizer
    shardings = jax.tree.map(lambda x: x.sharding, state)
    (batch,) = global_batches(_batches(config.data.context_length)[:1], mesh)
    compiled = train_step.lower(state, batch).compile()
    return _Run(config, mesh, jax.device_get(state), shardings, compiled)


@dataclasses.dataclass
class _Result:
    params: dict
    grads: dict
    losses: np.ndarray


def _steps(run, state, batches):
    """Yields the state and the loss after each step; the next step donates the state."""
    for batch in global_batches(batches, run.mesh):
        state, metrics = run.train_step(state, batch)
        nll, count = jax.device_get(metrics["loss"])
        yield state, nll / count


def _train(run, num_steps=_STEPS):
    grads, losses = None, []
    for state, loss in _steps(run, run.fresh_state(), run.batches(0, num_steps)):
        grads = grads or jax.device_get(unboxed(state.opt_state[0]))
        losses.append(loss)
    return _Result(unboxed(run.initial.params), grads, np.array(losses))


@functools.lru_cache
def _on_one_device(num_steps=_STEPS, **options):
    return _train(_prepare(_config(**options), num_devices=1), num_steps)


def _assert_same(found, expected, rtol=1e-5):
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    np.testing.assert_allclose(found.losses[0], expected.losses[0], rtol=1e-5)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-3)
    global_norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(expected.grads)))
    assert global_norm > 0.1

    def check(path, found, expected):
        scale = np.linalg.norm(expected) + 1e-3 * global_norm
        assert np.linalg.norm(found - expected) < rtol * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, found.grads, expected.grads)


def _summed(rows):
    totals = {}
    for kind, axes, count, num_bytes in rows:
        before = totals.get((kind, axes), (0, 0))
        totals[kind, axes] = before[0] + count, before[1] + num_bytes
    return totals


def _assert_sends_what_it_should(run):
    config = run.config
    found = find_collectives(run.train_step.as_text(), run.mesh)
    # At the end of a step, XLA merges the sums of gradients with those of metrics and norms.
    sums = [c for c in found if c.kind == "all-reduce" and not c.loops]
    traffic = expected_collectives(config, run.mesh, run.initial.params)
    in_loop = config.trainer.num_minibatches > 1
    at_end = [
        t for t in traffic if t.purpose == "gradients" or (t.kind == "all-reduce" and not in_loop)
    ]
    assert _summed(
        (c.kind, c.axes, c.count, c.count * c.num_bytes) for c in found if c not in sums
    ) == _summed((t.kind, t.axes, t.count, t.num_bytes) for t in traffic if t not in at_end)
    found_sums = _summed((c.kind, c.axes, c.count, c.num_bytes) for c in sums)
    expected_sums = _summed((t.kind, t.axes, t.count, t.num_bytes) for t in at_end)
    assert found_sums.keys() >= expected_sums.keys()
    # Three squared norms of every leaf, of gradient, parameter and update, and some metrics.
    numbers = 12 * len(jax.tree.leaves(unboxed(run.initial.params))) + 64
    for key, (_, num_bytes) in found_sums.items():
        expected = expected_sums.get(key, (0, 0))[1]
        assert expected <= num_bytes <= expected + numbers, key

    # No collective is in a loop that it could be moved out of.
    for collective in found:
        if "dp" in collective.axes:
            assert collective.loops == (), collective  # Once per step.
        if "fsdp" in collective.axes and run.mesh.shape["pp"] > 1:
            # Once per minibatch, not once per micro-batch.
            assert len(collective.loops) <= in_loop, collective


_MIXED = {"block": "xlstm_2024", "ratio": "[1:1]"}
_QUICK = [
    (1, {"dp": 8}),
    (4, {"fsdp": 8}),
    (1, {"pp": 8}),
    (4, {"tp": 8}),
    (1, {"fsdp": 2, "pp": 2, "tp": 2}),
    (4, {"dp": 2, "pp": 2, "tp": 2, "num_microbatches": 4}),
    (1, {"fsdp": 2, "pp": 2, "tp": 2, "tp_overlap": True, "num_microbatches": 1}),
    (1, {"cp": 8}),
    (4, {"fsdp": 2, "cp": 2, "tp": 2}),
]


def _cases():
    for sizes in _MESHES:
        for num_minibatches in (1, 4):
            is_quick = (num_minibatches, sizes) in _QUICK
            name = f"{sizes} accumulate {num_minibatches}{'' if is_quick else ' full'}"
            num_steps = _QUICK_STEPS if is_quick else _STEPS
            yield pytest.param(num_minibatches, sizes, num_steps, id=name)


@pytest.mark.parametrize("num_minibatches, sizes, num_steps", list(_cases()))
def test_every_mesh_trains_as_one_device_does(num_minibatches, sizes, num_steps):
    config = _config(num_minibatches, **sizes)
    run, expected = _prepare(config), _on_one_device(num_steps=num_steps)
    _assert_same(_train(run, num_steps), expected)
    assert expected.losses[-1] < 0.99 * expected.losses[0]
    _assert_sends_what_it_should(run)


@pytest.mark.parametrize(
    "num_minibatches, remat, options",
    [
        (1, "dots", {"fsdp": 2, "pp": 2, "tp": 2}),
        (1, "dots", {"cp": 4, "tp": 2}),
        pytest.param(4, "block", {"fsdp": 4, "tp": 2}, id="fsdp, tp full"),
        pytest.param(4, "dots", {"fsdp": 2, "pp": 4}, id="fsdp, pp full"),
        pytest.param(1, "none", {"pp": 2, "tp": 4, "tp_overlap": True}, id="overlap full"),
        pytest.param(4, "dots", {"dp": 2, "cp": 4}, id="dp, cp full"),
        pytest.param(1, "block", {"pp": 2, "cp": 2, "tp": 2}, id="pp, cp, tp full"),
        pytest.param(1, "none", {"fsdp": 2, "cp": 2, "tp": 2, "tp_overlap": True}, id="cp full"),
        pytest.param(2, "dots", {"cp": 8, "context_length": 2 * _T}, id="long cp full"),
    ],
    ids=str,
)
def test_the_block_of_2024_trains_as_on_one_device(num_minibatches, remat, options):
    config = _config(num_minibatches, "xlstm_2024", remat=remat, **options)
    data = {"context_length": config.data.context_length}
    run = _prepare(config)
    expected = _on_one_device(num_steps=_QUICK_STEPS, block="xlstm_2024", **data)
    # The norm magnifies heads with small outputs: even replicas (dp) differ by 1e-5.
    _assert_same(_train(run, _QUICK_STEPS), expected, rtol=3e-5)
    assert expected.losses[-1] < 0.99 * expected.losses[0]
    _assert_sends_what_it_should(run)


@pytest.mark.parametrize(
    "num_minibatches, remat, sizes",
    [
        (1, "dots", {"fsdp": 2, "pp": 2, "tp": 2}),
        (1, "dots", {"pp": 2, "cp": 2, "tp": 2}),
        pytest.param(4, "block", {"fsdp": 4, "tp": 2}, id="mixed fsdp, tp full"),
        pytest.param(1, "none", {"pp": 2, "tp": 4, "tp_overlap": True}, id="mixed overlap full"),
        pytest.param(4, "block", {"fsdp": 2, "cp": 4}, id="mixed fsdp, cp full"),
        pytest.param(1, "none", {"cp": 4, "tp": 2, "tp_overlap": True}, id="mixed cp full"),
    ],
    ids=str,
)
def test_a_mixed_stack_trains_as_on_one_device(num_minibatches, remat, sizes):
    config = _config(num_minibatches, remat=remat, **_MIXED, **sizes)
    run, expected = _prepare(config), _on_one_device(num_steps=_QUICK_STEPS, **_MIXED)
    _assert_same(_train(run, _QUICK_STEPS), expected, rtol=3e-5)
    assert expected.losses[-1] < 0.99 * expected.losses[0]
    _assert_sends_what_it_should(run)


@pytest.mark.parametrize(
    "num_minibatches, remat, sizes",
    [
        (1, "none", {"fsdp": 2, "pp": 2, "tp": 2}),
        (2, "block", {"dp": 2, "cp": 2, "tp": 2}),
        pytest.param(2, "dots", {"dp": 2, "fsdp": 2, "tp": 2}, id="dropout dp, fsdp full"),
        pytest.param(1, "dots", {"fsdp": 2, "pp": 2, "cp": 2}, id="dropout pp, cp full"),
    ],
    ids=str,
)
def test_dropout_and_rematerialization_do_not_depend_on_the_mesh(num_minibatches, remat, sizes):
    config = _config(num_minibatches, dropout=0.3, remat=remat, **sizes)
    run, expected = _prepare(config), _on_one_device(num_steps=2, dropout=0.3)
    _assert_same(_train(run, 2), expected)
    assert abs(expected.losses[0] - _on_one_device(num_steps=_QUICK_STEPS).losses[0]) > 1e-3
    _assert_sends_what_it_should(run)


def test_bfloat16_rounds_a_little():
    options = {"fsdp_gather_dtype": "bfloat16", "fsdp_scatter_dtype": "bfloat16"}
    config = _config(dtype="bfloat16", fsdp=2, pp=2, tp=2, **options)
    found = _train(_prepare(config), 1)
    expected = _on_one_device(num_steps=_QUICK_STEPS)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    np.testing.assert_allclose(found.losses[0], expected.losses[0], rtol=1e-3)

    def check(path, found, expected):
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < 5e-2, jax.tree_util.keystr(path)
        return error

    errors = jax.tree_util.tree_map_with_path(check, found.grads, expected.grads)
    assert all(error > 1e-4 for error in jax.tree.leaves(errors["blocks"]["ffn"]))


def _assert_goes_on(tmp_path, source, targets, model):
    """Asserts that the checkpoint of one run goes on in others as one device goes on."""
    *_, (state, _) = _steps(source, source.fresh_state(), source.batches(0, 3))
    with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
        checkpointer.save(3, state)
    expected = _on_one_device(num_steps=_QUICK_STEPS, **model).losses[3:6]
    for run in targets:
        with Checkpointer(str(tmp_path), max_to_keep=1) as checkpointer:
            state = checkpointer.restore(run.fresh_state())
        losses = [loss for _, loss in _steps(run, state, run.batches(3, 6))]
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=str(run.mesh))


@pytest.mark.parametrize("sizes", [{"fsdp": 2, "pp": 2}, {"fsdp": 2, "cp": 2}], ids=str)
def test_a_checkpoint_of_a_mesh_goes_on_on_any_other(tmp_path, sizes):
    runs = [_prepare(_config(), num_devices=1)]
    meshes = [case for case in _QUICK if "num_microbatches" not in case[1]]
    runs += [_prepare(_config(num_minibatches, **sizes)) for num_minibatches, sizes in meshes]
    source = next(run for run in runs if sizes.items() <= run.mesh.shape.items())
    _assert_goes_on(tmp_path, source, runs, {})


@pytest.mark.parametrize("is_reversed", [False, True])
def test_a_checkpoint_of_a_mixed_stack_goes_on_with_or_without_cp(tmp_path, is_reversed):
    """The parameters of sLSTM layers are sharded over `cp`."""
    runs = [
        _prepare(_config(**_MIXED, **{"fsdp": 2, "pp": 2, "tp": 2})),
        _prepare(_config(**_MIXED, **{"pp": 2, "cp": 2, "tp": 2})),
    ]
    source, target = reversed(runs) if is_reversed else runs
    _assert_goes_on(tmp_path, source, [target], _MIXED)


def test_weights_are_gathered_for_a_block_at_a_time():
    config = _config(4, fsdp=8)
    run = _prepare(config)
    found = find_collectives(run.train_step.as_text(), run.mesh)
    of_blocks = [c for c in found if c.kind == "all-gather" and c.loops]
    assert {c.loops for c in of_blocks} == {(4, config.model.num_blocks)}
    largest = config.model.embedding_dim * config.model.ffn_dim * 4
    assert max(c.num_bytes for c in of_blocks) == largest


def test_no_device_has_the_logits_of_the_whole_vocabulary():
    program = _prepare(_config(4, tp=8)).train_step.as_text()
    rows = _B // 4
    assert f"f32[{rows},{_T},{_V // 8}]" in program
    for shape in (f"[{rows},{_T},{_V}]", f"[{rows * _T},{_V}]"):
        assert shape not in program
    # Without tp, the same search finds them.
    program = _prepare(_config(dp=8)).train_step.as_text()
    assert f"f32[{_B // 8},{_T},{_V}]" in program
