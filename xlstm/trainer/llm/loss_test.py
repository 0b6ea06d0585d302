import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.dataset.batch import Batch
from xlstm.trainer.llm.loss import create_loss_fn, next_token_nll

_B, _T, _V = 2, 5, 7


def _batch(mask=None):
    rng = np.random.default_rng(0)
    return Batch(
        inputs=rng.integers(0, _V, (_B, _T)).astype(np.int32),
        targets=rng.integers(0, _V, (_B, _T)).astype(np.int32),
        targets_mask=rng.random((_B, _T)) < 0.6 if mask is None else mask,
        reset=rng.random((_B, _T)) < 0.3,
    )


def _apply(variables, inputs, reset):
    """Logits that depend on the parameters, the tokens and the resets."""
    return variables["params"]["table"][inputs] + jnp.where(reset, 1.0, 0.0)[
        ..., None
    ] * jnp.arange(_V)


def _params():
    return {"table": jnp.asarray(np.random.default_rng(1).normal(size=(_V, _V)), jnp.float32)}


def _expected(params, batch):
    """The definition, token by token in float64."""
    table = np.asarray(params["table"], np.float64)
    nll, count = 0.0, 0
    for b in range(_B):
        for t in range(_T):
            logits = table[batch.inputs[b, t]] + batch.reset[b, t] * np.arange(_V)
            if batch.targets_mask[b, t]:
                nll += np.log(np.exp(logits).sum()) - logits[batch.targets[b, t]]
                count += 1
    return nll, count


def test_nll_is_that_of_the_definition():
    nll, count = next_token_nll(_params(), _apply, _batch())
    expected_nll, expected_count = _expected(_params(), _batch())
    np.testing.assert_allclose(nll, expected_nll, rtol=1e-6)
    assert 0 < int(count) == expected_count < _B * _T
    assert nll.dtype == count.dtype == jnp.float32


def test_masked_targets_do_not_count_whatever_they_are():
    batch = _batch()
    nll, _ = next_token_nll(_params(), _apply, batch)
    other = np.where(batch.targets_mask, batch.targets, 0).astype(np.int32)
    np.testing.assert_array_equal(
        next_token_nll(_params(), _apply, batch.replace(targets=other))[0], nll
    )


def test_without_targets_loss_and_gradient_are_zero():
    batch = _batch(np.zeros((_B, _T), bool))
    value, grads = jax.value_and_grad(lambda p: next_token_nll(p, _apply, batch)[0])(_params())
    assert float(value) == 0.0
    np.testing.assert_array_equal(grads["table"], 0.0)


def test_even_logits_cost_the_logarithm_of_the_vocabulary():
    nll, count = next_token_nll(
        {"table": jnp.zeros((_V, _V))}, _apply, _batch().replace(reset=np.zeros((_B, _T), bool))
    )
    np.testing.assert_allclose(nll / count, np.log(_V), rtol=1e-6)


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_the_loss_is_normalised_by_the_targets_of_the_global_batch(num_minibatches):
    loss_fn = create_loss_fn(num_minibatches, jnp.float32(100.0))
    loss, (metrics, mutable) = loss_fn(_params(), _apply, _batch(), jax.random.PRNGKey(0))
    nll, count = _expected(_params(), _batch())
    np.testing.assert_allclose(loss, nll * num_minibatches / 100, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (nll, count), rtol=1e-6)
    assert mutable is None
