import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from xlstm.dataset.config import DataConfig
from xlstm.dataset.testing import write_letter_store
from xlstm.dataset.validation import open_validation_sets
from xlstm.distributed.mesh import MeshConfig, create_mesh
from xlstm.trainer.llm.evaluation import create_evaluation

_VOCAB_SIZE = 257


def _apply(variables, inputs, targets, targets_mask, reset, method, mutable):
    """Applies a model whose logits do not depend on the inputs."""
    assert method == "eval_sums"
    logits = variables["params"]["logits"]
    nll = -jax.nn.log_softmax(logits)[targets]
    is_correct = (targets == jnp.argmax(logits)) & targets_mask
    sums = jnp.where(targets_mask, nll, 0.0), is_correct, targets_mask
    return tuple(jnp.sum(x, dtype=jnp.float32)[None] for x in sums), {}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two sets: the held-out part of a store, and another store."""
    folder = tmp_path_factory.mktemp("stores")
    store = write_letter_store(folder / "store")
    other = write_letter_store(folder / "other", first=61, seed=1)
    data = DataConfig(
        stores=(store.path,),
        context_length=16,
        batch_size=8,
        validation_fraction=0.3,
        validation_stores=(f"wiki={other.path}",),
    )
    return open_validation_sets(data, [store])


def _params(scale=1.0):
    return {"logits": np.float32(scale * np.random.default_rng(0).normal(size=_VOCAB_SIZE))}


def _evaluate(sets, params, max_batches=None, num_devices=1, **sizes):
    mesh, calls = create_mesh(MeshConfig(**sizes), jax.devices()[:num_devices]), []
    evaluate = create_evaluation(
        mesh, {"logits": P()}, _apply, sets, max_batches, lambda: calls.append(1)
    )
    return evaluate(params), len(calls)


def _expected(validation_set, params, max_batches):
    """Loss, perplexity, accuracy and bits per byte in float64."""
    logits = np.float64(params["logits"])
    nll_of = np.log(np.exp(logits).sum()) - logits
    batches = list(validation_set.batches(max_batches=max_batches))
    targets = np.concatenate([batch.targets[batch.targets_mask] for batch in batches])
    nll = nll_of[targets].sum()
    num_bytes = (targets != 0).sum()  # The marker has no bytes.
    accuracy = (targets == logits.argmax()).mean()
    bits = nll / np.log(2) / num_bytes
    return nll / targets.size, np.exp(nll / targets.size), accuracy, bits, len(batches)


@pytest.mark.parametrize("sizes", [{}, {"dp": 2, "fsdp": 4, "num_devices": 8}], ids=str)
@pytest.mark.parametrize("max_batches", [None, 2])
def test_every_set_is_measured(sets, sizes, max_batches):
    row, num_calls = _evaluate(sets, _params(), max_batches, **sizes)
    expected, num_batches = {}, 0
    for validation_set, suffix in zip(sets, ["", "_wiki"], strict=True):
        loss, perplexity, accuracy, bits, count = _expected(validation_set, _params(), max_batches)
        expected[f"val_loss{suffix}"] = loss
        expected[f"val_perplexity{suffix}"] = perplexity
        expected[f"val_accuracy{suffix}"] = accuracy
        expected[f"val_bits_per_byte{suffix}"] = bits
        num_batches += count
    assert row == pytest.approx(expected, rel=1e-5)
    assert num_calls == num_batches > 2
    assert row["val_loss"] != row["val_loss_wiki"]


def test_a_loss_that_is_not_finite_is_an_error(sets):
    with pytest.raises(ValueError, match="val_loss_wiki is nan: the model has diverged"):
        _evaluate(sets[1:], _params(np.nan))


def test_a_bad_model_has_a_large_perplexity_not_an_error(sets):
    row, _ = _evaluate(sets[:1], _params(1e6))
    assert row["val_loss"] > 1e4 and np.isfinite(row["val_perplexity"])
