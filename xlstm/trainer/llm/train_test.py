"""Tests of whole runs in one process: bad steps, rollbacks, and changes at a resume."""

import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from xlstm.dataset.config import DataConfig
from xlstm.dataset.store_data import open_stores, train_batches
from xlstm.dataset.testing import write_store
from xlstm.distributed.mesh import MeshConfig
from xlstm.models.xlstm_parallel.config import ModelConfig
from xlstm.trainer.base.config import TrainerConfig
from xlstm.trainer.base.update import update_state
from xlstm.trainer.checkpoints.checkpointer import Checkpointer
from xlstm.trainer.checkpoints.folder import CheckpointFolder, confirmed_step
from xlstm.trainer.llm import callbacks as callbacks_module
from xlstm.trainer.llm import language_model
from xlstm.trainer.llm import train as train_module
from xlstm.trainer.llm.carried_state import CarriedState
from xlstm.trainer.llm.config import RunConfig
from xlstm.trainer.llm.evaluation import DivergedError
from xlstm.trainer.llm.loss import loss_metrics
from xlstm.trainer.llm.resume import roll_back
from xlstm.trainer.llm.train import open_training, train_language_model
from xlstm.trainer.logger.base_logger import Logger, LoggerConfig
from xlstm.trainer.optimizer.schedule import ScheduleConfig

_POISON = 7  # A byte that makes gradients NaN.
_STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def shared_work(tmp_path_factory):
    """Lets the runs share compiled programs and the measured speed of the machine."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    measure = functools.cache(callbacks_module.measure_matmul_rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks_module, "measure_matmul_rate", measure)
        patch.setattr(train_module, "create_training", _create_training)
        patch.setattr(train_module, "unused_accelerator_line", lambda mesh: "check the cable")
        yield


def _create_training(config, mesh):
    """Calls `create_training`, but traces and compiles only once for equal runs."""
    # Everything that `create_training` reads, and the functions that fixtures below replace.
    state, specs, train_step = _shared_training(
        dataclasses.replace(
            config.with_decay_steps(),
            data=DataConfig(
                batch_size=config.data.batch_size,
                shuffle=config.data.shuffle,
                carry_state=config.data.carry_state,
            ),
            trainer=TrainerConfig(
                seed=config.trainer.seed, num_minibatches=config.trainer.num_minibatches
            ),
        ),
        mesh,
        language_model.loss_metrics,
        language_model.update_state,
    )
    return jax.tree.map(jax.numpy.copy, state), specs, train_step  # Steps donate the state.


@functools.cache
def _shared_training(config, mesh, *replaced):
    del replaced  # Functions that `create_training` calls.
    return language_model.create_training(config, mesh)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The path of a token store with one poisoned document."""
    path = tmp_path_factory.mktemp("data") / "store"
    documents = [f"x{i} = {i}\n" * 40 for i in range(40)]
    documents[17] = "\x07" * 300
    write_store(path, documents)
    return str(path)


def _config(store, **sections):
    config = RunConfig(
        model=ModelConfig(embedding_dim=16, num_blocks=1, num_heads=2),
        mesh=MeshConfig(fsdp_min_weight_size=64),
        data=DataConfig(
            stores=(store,),
            context_length=16,
            batch_size=8,
            validation_fraction=0.0,
            seed=4,  # With this seed, two batches are poisoned.
        ),
        schedule=ScheduleConfig(warmup_steps=2, decay="constant", decay_steps=8),
        trainer=TrainerConfig(num_steps=_STEPS, checkpoint_interval=2, max_checkpoints=9),
        logger=LoggerConfig(interval=1, tensorboard=False, sample_tokens=0),
    )
    return _with(config, **sections)


def _with(config, **sections):
    """Returns a configuration with some fields of some sections replaced."""
    for section, fields in sections.items():
        changed = dataclasses.replace(getattr(config, section), **fields)
        config = dataclasses.replace(config, **{section: changed})
    return config


def _rows(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    return [json.loads(line) for line in text.splitlines()]


def _losses(workdir):
    return {row["step"]: row["loss"] for row in _rows(workdir) if "loss" in row}


def _rollbacks(workdir):
    """Returns the steps to which a run was rolled back, by the step at which it was."""
    return {r["step"]: r["rolled_back_to"] for r in _rows(workdir) if "rolled_back_to" in r}


def _last_state(config, workdir):
    """Returns the state from which the run would resume."""
    with open_training(config, str(workdir)) as run:
        assert run.start_step == config.trainer.num_steps
        return jax.device_get(run.state)


def _assert_same_end(config, first, second):
    """Checks that two runs have the same losses and the same last state, bit by bit."""
    assert _losses(first) == _losses(second)
    states = [_last_state(config, workdir) for workdir in (first, second)]
    jax.tree.map(np.testing.assert_array_equal, *map(jax.tree.leaves, states))


@pytest.fixture
def poisonous(monkeypatch):
    """Makes the gradient NaN if the batch contains the poison."""
    monkeypatch.setattr(language_model, "loss_metrics", _poisoned_loss_metrics)


def _poisoned_loss_metrics(params, apply_fn, batch, *args, **kwargs):
    metrics, carried = loss_metrics(params, apply_fn, batch, *args, **kwargs)
    poison = jax.numpy.where(jax.numpy.any(batch.inputs == _POISON), np.nan, 1.0)
    nll, count = metrics["loss"]
    return metrics | {"loss": (nll * poison, count)}, carried


@pytest.fixture(scope="module")
def bad_steps(store):
    """The steps whose batches contain the poison."""
    data = _config(store).data
    batches = train_batches(data, open_stores(data, ""))
    steps = [
        step
        for step, batch in zip(range(1, _STEPS + 1), batches, strict=False)
        if (batch.inputs == _POISON).any()
    ]
    assert len(steps) > 1 and steps[-1] < _STEPS, steps
    return steps


def _assert_dumped(workdir, store, step):
    """Checks that the batch of a bad step was saved with the documents that it came from."""
    with np.load(workdir / "bad_batches" / f"step_{step}.npz") as batch:
        rows = np.flatnonzero((batch["inputs"] == _POISON).any(axis=1))
    origins = json.loads((workdir / "bad_batches" / f"step_{step}.json").read_text())
    assert len(origins) == 8
    for row in rows:
        assert origins[row]["store"] == store
        assert origins[row]["first_document"] <= 17 <= origins[row]["last_document"]


def test_stop_names_the_batch_and_keeps_what_is_good(tmp_path, store, poisonous, bad_steps):
    config = _config(store)
    with pytest.raises(ValueError, match=f"training diverged at step {bad_steps[0]} ") as error:
        train_language_model(config, str(tmp_path))
    assert "documents" in str(error.value) and store in str(error.value)
    _assert_dumped(tmp_path, store, bad_steps[0])
    *good, bad = _rows(tmp_path)
    assert [row["step"] for row in good] == list(range(1, bad_steps[0]))
    assert bad["step"] == bad_steps[0] and bad["skipped_steps"] == 1 and "loss" not in bad
    kept = [int(name) for name in os.listdir(tmp_path / "checkpoints")]
    assert max(kept) == (bad_steps[0] - 1) // 2 * 2


def test_skip_leaves_the_step_out_and_goes_on(tmp_path, store, poisonous, bad_steps, capsys):
    config = _config(store, trainer={"nan_policy": "skip"})
    train_language_model(config, str(tmp_path))
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, _STEPS + 1))
    for row in rows:
        assert row["skipped_steps"] == sum(step <= row["step"] for step in bad_steps)
        assert ("loss" in row) == (row["step"] not in bad_steps)
    output = capsys.readouterr().out
    assert output.count("check the cable\n") == 1
    for step in bad_steps:
        _assert_dumped(tmp_path, store, step)
        assert f"training diverged at step {step} " in output
    state = _last_state(config, tmp_path)
    assert state.skipped_steps == len(bad_steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_rollback_goes_on_behind_the_step_with_the_last_checkpoint(
    tmp_path, store, poisonous, bad_steps
):
    config = _config(store, trainer={"nan_policy": "rollback"})
    train_language_model(config, str(tmp_path))
    rows = _rows(tmp_path)
    returns = _rollbacks(tmp_path)
    # The newest checkpoint before the bad step; checkpoints are two steps apart.
    assert returns == {step: (step - 1) // 2 * 2 for step in bad_steps}
    assert [row["step"] for row in rows if "loss" in row] == [
        step for step in range(1, _STEPS + 1) if step not in bad_steps
    ]
    assert rows[-1]["skipped_steps"] == sum(step - saved for step, saved in returns.items())


def test_a_run_that_fails_after_a_rollback_ends_as_one_that_does_not(
    tmp_path, store, poisonous, bad_steps, monkeypatch
):
    """The second start rolls back again, to the same checkpoint."""
    trainer = {"nan_policy": "rollback", "checkpoint_interval": 3}
    config, to_scalars = _config(store, trainer=trainer), train_module.metrics_to_scalars
    train_language_model(config, str(tmp_path / "whole"))
    num_rows = 0

    def failing(metrics):
        nonlocal num_rows
        num_rows += 1
        if num_rows == bad_steps[0] + 2:
            raise ZeroDivisionError
        return to_scalars(metrics)

    monkeypatch.setattr(train_module, "metrics_to_scalars", failing)
    with pytest.raises(ZeroDivisionError):
        train_language_model(config, str(tmp_path / "parts"))
    assert _rollbacks(tmp_path / "parts")
    train_language_model(config, str(tmp_path / "parts"))
    _assert_same_end(config, tmp_path / "parts", tmp_path / "whole")


def test_a_rollback_takes_no_damaged_checkpoint(tmp_path, store, poisonous, bad_steps, monkeypatch):
    newest, discard_unusable = (bad_steps[1] - 1) // 2 * 2, Checkpointer.discard_unusable

    def damage_first(checkpointer):
        checkpointer.wait_until_finished()
        for path in (tmp_path / "checkpoints" / str(newest)).rglob("d/*"):
            path.write_bytes(path.read_bytes()[:-1])
        return discard_unusable(checkpointer)

    monkeypatch.setattr(Checkpointer, "discard_unusable", damage_first)
    train_language_model(_config(store, trainer={"nan_policy": "rollback"}), str(tmp_path))
    assert _rollbacks(tmp_path)[bad_steps[1]] == newest - 2
    assert os.listdir(tmp_path / "damaged_checkpoints") == [str(newest)]


def test_too_many_bad_steps_in_a_row_stop_a_run(tmp_path, store, poisonous, bad_steps):
    trainer = {"nan_policy": "skip", "max_skipped_steps": 1}
    with pytest.raises(ValueError, match="the last of 1 such steps in a row"):
        train_language_model(_config(store, trainer=trainer), str(tmp_path))


@pytest.fixture
def ruinous(monkeypatch):
    """Raises the learning rate to 1e3 after step 6: updates stay finite at first, but ruin all."""
    monkeypatch.setattr(language_model, "update_state", _update_state_ruinously)


def _update_state_ruinously(*args, schedule, **options):
    def rate(step):
        return jax.numpy.where(step >= 6, 1e3, schedule(step))

    return update_state(*args, schedule=rate, **options)


def test_a_streak_of_bad_steps_costs_no_good_checkpoint(tmp_path, store, ruinous, monkeypatch):
    config = _config(store, trainer={"nan_policy": "skip", "max_checkpoints": 1})
    with pytest.raises(ValueError, match="confirmed.* step 6.*peak_lr"):
        train_language_model(config, str(tmp_path / "ruined"))
    saved = CheckpointFolder(str(tmp_path / "ruined" / "checkpoints")).metadata()
    assert confirmed_step(saved) == 6 and len(saved) == 2
    norms = [row["param_norm"] for row in _rows(tmp_path / "ruined") if "param_norm" in row]
    assert norms[-1] > 100 * norms[0]
    monkeypatch.undo()
    for name in ("clean", "ruined"):
        train_language_model(config, str(tmp_path / name))
    _assert_same_end(config, tmp_path / "ruined", tmp_path / "clean")


def test_a_rollback_goes_to_before_the_streak(tmp_path, store, ruinous, monkeypatch):
    config = _config(store, trainer={"nan_policy": "rollback", "max_checkpoints": 1})
    # The steps after the rollback are ruined too.
    with pytest.raises(ValueError, match="12 steps are done, but .*the last one that is: step"):
        train_language_model(config, str(tmp_path))
    returns = _rollbacks(tmp_path)
    assert list(returns.values()) == [6] and min(returns) > 8
    monkeypatch.undo()
    train_language_model(config, str(tmp_path))
    state = _last_state(config, tmp_path)
    assert state.skipped_steps == min(returns) - 6
    assert all(np.abs(leaf).max() < 20 for leaf in jax.tree.leaves(state.params))


def _stop_in_a_streak(config, workdir, monkeypatch, *, first):
    """Stops a run at the first of its steps with a spiked loss."""
    to_scalars, steps = train_module.metrics_to_scalars, itertools.count(1)

    def spiked(metrics):
        row, step = to_scalars(metrics), next(steps)
        if step == first:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return row | {"loss": row["loss"] + 9 * (step >= first)}

    monkeypatch.setattr(train_module, "metrics_to_scalars", spiked)
    train_language_model(config, str(workdir))
    monkeypatch.undo()


def test_a_stop_in_a_streak_goes_on_from_before_it(tmp_path, store, monkeypatch, capsys):
    config = _config(store, trainer={"checkpoint_interval": 5})
    _stop_in_a_streak(config, tmp_path, monkeypatch, first=7)
    output = capsys.readouterr().out
    assert "step 7 is not sound: its loss" in output
    assert re.search(r"stopped after step \d+, .* resumes from step 5, the last confirmed", output)
    train_language_model(config, str(tmp_path))
    assert "resuming from step 5" in capsys.readouterr().out


def test_a_stop_without_a_confirmed_checkpoint(tmp_path, store, monkeypatch, capsys):
    config = _config(store)
    _stop_in_a_streak(config, tmp_path, monkeypatch, first=2)
    output = capsys.readouterr().out
    assert re.search(r"stopped after step \d+, .*: no checkpoint is confirmed; set .*=0", output)
    with pytest.raises(OSError, match="no checkpoint in .* is both confirmed and undamaged"):
        train_language_model(config, str(tmp_path))
    trainer = dataclasses.replace(config.trainer, confirm_steps=0)
    config = dataclasses.replace(config, trainer=trainer)
    train_language_model(config, str(tmp_path))
    assert "resuming from step" in capsys.readouterr().out


def test_a_run_goes_on_with_a_longer_schedule_that_begins_alike(tmp_path, store):
    longer = {"decay_steps": 10, "cooldown_steps": 2}
    features = {
        "optimizer": {"ema_decay": 0.9},
        "data": {"ramp_batch_sizes": (4,), "ramp_steps": (5,)},
    }
    short = _config(store, trainer={"num_steps": 6}, **features)
    long = _config(store, schedule=longer, **features)
    train_language_model(long, str(tmp_path / "whole"))
    train_language_model(short, str(tmp_path / "parts"))
    # The checkpoint interval may change too.
    train_language_model(_with(long, trainer={"checkpoint_interval": 5}), str(tmp_path / "parts"))
    _assert_same_end(long, tmp_path / "parts", tmp_path / "whole")
    tokens = [row["tokens"] for row in _rows(tmp_path / "parts")]
    assert np.diff([0, *tokens]).tolist() == [64] * 5 + [128] * 7

    # A change that would have changed earlier steps is rejected.
    with pytest.raises(ValueError, match="schedule.peak_lr was 0.001, is 1.0"):
        train_language_model(_with(long, schedule={"peak_lr": 1.0}), str(tmp_path / "parts"))


def test_a_run_that_began_before_keeps_its_order_and_its_weight_decay(tmp_path, store, capsys):
    model = {"block": "xlstm_2024"}  # It has a parameter that used to be decayed.
    optimizer = {"weight_decay": 1.0}
    today = _config(store, model=model, optimizer=optimizer, trainer={"num_steps": 6})
    former = {
        "optimizer": optimizer | {"weight_decay_exclude": ("bias", "norm", "embeddings")},
        "data": {"shuffle": "grain"},
    }
    whole = _config(store, model=model, trainer={"num_steps": 6}, **former)
    train_language_model(whole, str(tmp_path / "whole"))
    train_language_model(_with(whole, trainer={"num_steps": 4}), str(tmp_path / "parts"))
    content = json.loads((tmp_path / "parts" / "config.json").read_text())
    del content["config"]["data"]["shuffle"]  # Old runs lack this field.
    (tmp_path / "parts" / "config.json").write_text(json.dumps(content))
    capsys.readouterr()

    train_language_model(today, str(tmp_path / "parts"))
    output = capsys.readouterr().out
    assert "keeping the defaults that the run began with: data.shuffle='grain', optimi" in output
    (row,) = (line for line in output.splitlines() if "mlstm_layer.skip " in line)
    assert row.endswith("yes")
    _assert_same_end(today, tmp_path / "parts", tmp_path / "whole")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("whole", "parts")]
    assert configs[0] == configs[1]

    # A new run has another order and does not decay the parameter.
    capsys.readouterr()
    with open_training(today, str(tmp_path / "today")) as run:
        batch = next(run.batches_from(0))
    output = capsys.readouterr().out
    assert "keeping" not in output
    (row,) = (line for line in output.splitlines() if "mlstm_layer.skip " in line)
    assert row.endswith("no")
    old = next(train_batches(whole.data, open_stores(whole.data, "")))
    assert np.any(batch.inputs != old.inputs)


def test_a_mixed_stack_on_a_task_goes_on_as_if_never_stopped(tmp_path, store):
    task = {
        "data": {
            "task": "parity",
            "stores": ("stdlib",),
            "context_length": 32,
            "task_lengths": (1, 20),
            "validation_lengths": ("21-40",),
        },
        "model": {"vocab_size": 4, "num_blocks": 2, "ratio": "[1:1]"},
    }
    trainer = {"num_steps": 6, "eval_interval": 3, "eval_batches": 2}
    config = _config(store, **task, trainer=trainer)
    train_language_model(config, str(tmp_path / "whole"))
    train_language_model(_with(config, trainer={"num_steps": 4}), str(tmp_path / "parts"))
    train_language_model(config, str(tmp_path / "parts"))
    _assert_same_end(config, tmp_path / "parts", tmp_path / "whole")
    rows = [row for row in _rows(tmp_path / "whole") if "loss" not in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    names = {f"val_{what}_lengths_21_40" for what in ("loss", "perplexity", "accuracy")}
    assert rows[-1].keys() == names | {"step"}
    # Another task means other data.
    with pytest.raises(ValueError, match="data.task was 'parity', is 'majority'"):
        train_language_model(_with(config, data={"task": "majority"}), str(tmp_path / "whole"))


def test_a_run_that_carries_its_state_goes_on_as_if_never_stopped(tmp_path, store):
    data = {"shuffle": "contiguous", "carry_state": True, "validation_fraction": 0.1}
    trainer = {"num_steps": 6, "eval_interval": 3, "eval_batches": 2}
    config = _config(store, data=data, trainer=trainer)
    train_language_model(config, str(tmp_path / "whole"))
    train_language_model(_with(config, trainer={"num_steps": 4}), str(tmp_path / "parts"))
    train_language_model(config, str(tmp_path / "parts"))
    _assert_same_end(config, tmp_path / "parts", tmp_path / "whole")
    rows = [row for row in _rows(tmp_path / "whole") if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 6]
    # The state matters.
    alone = _with(config, data={"carry_state": False})
    train_language_model(alone, str(tmp_path / "alone"))
    of_alone, carried = _losses(tmp_path / "alone"), _losses(tmp_path / "whole")
    assert of_alone[1] == carried[1] and of_alone[2] != carried[2]

    # After a rollback the rows have gone on to other documents.
    with open_training(config, str(tmp_path / "whole")) as run:
        state = jax.tree.map(jax.numpy.copy, run.state)
        assert all(np.any(x) for x in jax.tree.leaves(jax.device_get(state.carried_state)))
        state = roll_back(run, Logger(), run.checkpointer, 9, state)
        assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get(state.carried_state)))
        assert int(state.skipped_steps) == 3

    # Another order has no rows that continue.
    with pytest.raises(ValueError, match="data.shuffle='permutation' does not keep in order"):
        _with(config, data={"shuffle": "permutation"})


def test_rows_that_read_other_text_than_before_start_over(tmp_path, store, capsys):
    data = {"shuffle": "contiguous", "carry_state": True, "validation_fraction": 0.1}
    config = _config(store, data=data, trainer={"num_steps": 2})
    train_language_model(config, str(tmp_path / "run"))
    write_store(tmp_path / "other", ["another text " * 30] * 40)
    changes = {
        "data.batch_size was 8, is 4": {"batch_size": 4},
        "data.context_length was 16, is 8": {"context_length": 8},
        "data.validation_fraction was 0.1, is 0.2": {"validation_fraction": 0.2},
        "the token stores hold other text": {"stores": (str(tmp_path / "other"),)},
    }
    for number, (text, fields) in enumerate(({"": {}} | changes).items()):
        folder, changed = tmp_path / str(number), _with(config, data=fields)
        shutil.copytree(tmp_path / "run", folder)
        with open_training(changed, str(folder), allow_config_change=True) as run:
            carried = jax.device_get(run.state.carried_state)
        assert any(np.any(x) for x in jax.tree.leaves(carried)) == (not text)
        expected = CarriedState.of_run(changed).zeros()
        assert jax.tree.map(np.shape, carried) == jax.tree.map(np.shape, expected)
        line = f"all rows start with the zero state: {text}\n"
        assert (line in capsys.readouterr().out) == bool(text)


def test_a_validation_loss_that_is_not_finite_names_the_good_checkpoint(
    tmp_path, store, monkeypatch
):
    steps = itertools.count(0, 4)

    def create(*args, **options):
        def evaluate(params):
            if next(steps) == 4:
                raise DivergedError("val_loss is nan")
            return {"val_loss": 1.0, "val_perplexity": 2.0, "val_accuracy": 0.5}

        return evaluate

    monkeypatch.setattr(callbacks_module, "create_evaluation", create)
    options = {"data": {"validation_fraction": 0.1}, "trainer": {"eval_interval": 4}}
    with pytest.raises(ValueError, match=r"val_loss is nan\. The last confirmed .* step 2: resume"):
        train_language_model(_config(store, **options), str(tmp_path))
