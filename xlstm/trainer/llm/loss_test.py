import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xlstm.dataset.batch import Batch
from xlstm.models.shared.moments import Moments
from xlstm.models.xlstm_parallel.pattern import find_pattern
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


def _apply(variables, inputs, targets, targets_mask, reset, dropout_keys, *, method):
    """Applies a model whose logits depend on the parameters, the tokens and the resets."""
    assert method == "next_token_nll" and dropout_keys is None
    logits = variables["params"]["table"][inputs]
    logits += jnp.where(reset, 1.0, 0.0)[..., None] * jnp.arange(_V)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(jnp.where(targets_mask, nll, 0)), jnp.sum(targets_mask, dtype=jnp.float32)


def _params():
    return {"table": jnp.asarray(np.random.default_rng(1).normal(size=(_V, _V)), jnp.float32)}


def _expected(params, batch):
    """Computes the definition, token by token in float64."""
    table = np.asarray(params["table"], np.float64)
    nll, count = 0.0, 0
    for b in range(_B):
        for t in range(_T):
            logits = table[batch.inputs[b, t]] + batch.reset[b, t] * np.arange(_V)
            if batch.targets_mask[b, t]:
                nll += np.log(np.exp(logits).sum()) - logits[batch.targets[b, t]]
                count += 1
    return nll, count


def test_nll_is_what_the_model_says():
    found = next_token_nll(_params(), _apply, _batch())
    np.testing.assert_allclose(found, _expected(_params(), _batch()), rtol=1e-6)


def test_dropout_keys_reach_the_model():
    def apply_fn(variables, *arguments, method):
        return arguments[-1].sum(), method

    keys = jnp.arange(_B)
    found = next_token_nll(_params(), apply_fn, _batch(), keys)
    assert found == (keys.sum(), "next_token_nll")
    loss_fn = create_loss_fn(1, jnp.float32(1))
    loss, _ = loss_fn(_params(), apply_fn, (_batch(), keys), None)
    assert loss == keys.sum()


@pytest.mark.parametrize("num_minibatches", [1, 4])
def test_the_loss_is_normalized_by_the_targets_of_the_global_batch(num_minibatches):
    loss_fn = create_loss_fn(num_minibatches, jnp.float32(100.0))
    loss, (metrics, mutable) = loss_fn(_params(), _apply, (_batch(), None), None)
    nll, count = _expected(_params(), _batch())
    np.testing.assert_allclose(loss, nll * num_minibatches / 100, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (nll, count), rtol=1e-6)
    assert mutable is None


def test_gate_statistics_come_with_the_loss():
    moments = Moments(jnp.ones(3), jnp.arange(3.0), jnp.arange(3.0))

    def apply_fn(*arguments, mutable, **options):
        assert mutable == ["intermediates"]
        layer = {"gate_moments": ({"igate": moments},)}
        return _apply(*arguments, **options), {"intermediates": {"blocks": {"mlstm_layer": layer}}}

    loss_fn = create_loss_fn(4, jnp.float32(100.0), gate_pattern=find_pattern(["xlstm_7b"] * 3))
    loss, (metrics, mutable) = loss_fn(_params(), apply_fn, (_batch(), None), None)
    nll, count = _expected(_params(), _batch())
    np.testing.assert_allclose(loss, nll * 4 / 100, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], (nll, count), rtol=1e-6)
    np.testing.assert_array_equal(metrics["gates"]["igate"], moments)
    assert mutable is None
