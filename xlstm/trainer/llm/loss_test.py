import jax
import jax.numpy as jnp
import numpy as np

from xlstm.dataset.batch import Batch
from xlstm.models.shared.moments import Moments
from xlstm.models.xlstm_parallel.pattern import find_pattern
from xlstm.trainer.llm.loss import eval_sums, loss_metrics

_B, _T, _V = 2, 5, 7


def _batch(mask=None):
    rng = np.random.default_rng(0)
    return Batch(
        inputs=rng.integers(0, _V, (_B, _T)).astype(np.int32),
        targets=rng.integers(0, _V, (_B, _T)).astype(np.int32),
        targets_mask=rng.random((_B, _T)) < 0.6 if mask is None else mask,
        reset=rng.random((_B, _T)) < 0.3,
    )


def _apply(variables, inputs, targets, targets_mask, reset, dropout_keys, *, method, mutable):
    """Applies a model whose logits depend on the parameters, the tokens and the resets."""
    assert method == "next_token_nll" and dropout_keys is None and not mutable
    logits = variables["params"]["table"][inputs]
    logits += jnp.where(reset, 1.0, 0.0)[..., None] * jnp.arange(_V)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    sums = jnp.sum(jnp.where(targets_mask, nll, 0)), jnp.sum(targets_mask, dtype=jnp.float32)
    return sums, {}


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


def test_dropout_keys_reach_the_model():
    def apply_fn(variables, *arguments, method, mutable):
        return (arguments[-1].sum(), method), {}

    keys = jnp.arange(_B)
    metrics, carried = loss_metrics(_params(), apply_fn, _batch(), keys)
    assert metrics == {"loss": (keys.sum(), "next_token_nll")} and carried is None


def test_the_carried_state_goes_through_the_model():
    def apply_fn(variables, *arguments, method, mutable):
        assert mutable == ["carried_state"]
        return method, {"carried_state": variables["carried_state"] + 1}

    metrics, carried = loss_metrics(_params(), apply_fn, _batch(), None, 1)
    assert metrics == {"loss": "next_token_nll"} and carried == 2
    assert eval_sums(_params(), apply_fn, _batch(), 1) == ("eval_sums", 2)


def test_the_loss_is_a_sum_over_the_targets_and_their_number():
    metrics, _ = loss_metrics(_params(), _apply, _batch(), None)
    assert metrics.keys() == {"loss"}
    np.testing.assert_allclose(metrics["loss"], _expected(_params(), _batch()), rtol=1e-6)


def test_gate_statistics_come_with_the_loss():
    moments = Moments(jnp.ones(3), jnp.arange(3.0), jnp.arange(3.0))

    def apply_fn(*arguments, mutable, **options):
        assert mutable == ["intermediates"]
        layer = {"gate_moments": ({"igate": moments},)}
        sums, _ = _apply(*arguments, **options, mutable=[])
        return sums, {"intermediates": {"blocks": {"mlstm_layer": layer}}}

    pattern = find_pattern(["xlstm_7b"] * 3)
    metrics, _ = loss_metrics(_params(), apply_fn, _batch(), None, gate_pattern=pattern)
    np.testing.assert_allclose(metrics["loss"], _expected(_params(), _batch()), rtol=1e-6)
    np.testing.assert_array_equal(metrics["gates"]["igate"], moments)
