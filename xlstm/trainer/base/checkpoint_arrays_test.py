import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xlstm.common_types import TrainState
from xlstm.trainer.base.checkpoint_arrays import (
    arrays_to_read,
    fill_average,
    named_arrays,
    with_arrays,
)
from xlstm.trainer.base.param_utils import unboxed

_OPTIMIZER = optax.adam(1e-2)


def _state(optimizer=_OPTIMIZER, with_ema=False):
    params = {
        "blocks": {"w": nn.Partitioned(jnp.ones((2, 3)), names=(None, "tp"))},
        "bias": jnp.zeros(3),
    }
    return TrainState(
        step=jnp.array(4),
        apply_fn=None,
        params=params,
        tx=optimizer,
        opt_state=optimizer.init(unboxed(params)),
        rng=jax.random.PRNGKey(0),
        params_ema=jax.tree.map(lambda x: x + 1, params) if with_ema else None,
        grad_norm_mean=jnp.array(0.5),
        skipped_steps=jnp.array(1),
    )


_NAMES = {
    "params.blocks.w",
    "params.bias",
    "opt_state.0.count",
    "opt_state.0.mu.blocks.w",
    "opt_state.0.mu.bias",
    "opt_state.0.nu.blocks.w",
    "opt_state.0.nu.bias",
    "step",
    "rng",
    "grad_norm_mean",
    "skipped_steps",
}
_AVERAGE = {"params_ema.blocks.w", "params_ema.bias"}


@pytest.mark.parametrize("with_ema", [False, True])
def test_arrays_have_names_and_find_back(with_ema):
    state = _state(with_ema=with_ema)
    arrays = named_arrays(state)
    assert arrays.keys() == _NAMES | (_AVERAGE if with_ema else set())
    assert all(isinstance(array, jax.Array) for array in arrays.values())
    found = with_arrays(state, {name: x + 7 for name, x in arrays.items()})
    expected = jax.tree.map(lambda x: x + 7, state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_only_the_average_may_be_missing():
    without, with_it = named_arrays(_state()), named_arrays(_state(with_ema=True))
    assert arrays_to_read(without, with_it).keys() == without.keys()
    assert arrays_to_read(with_it, with_it).keys() == with_it.keys()
    assert arrays_to_read(with_it, without).keys() == without.keys()
    for name in _NAMES:
        some = {other: x for other, x in without.items() if other != name}
        with pytest.raises(ValueError, match=f"{name} is .* there, missing in this configuration"):
            arrays_to_read(some, without)
        with pytest.raises(ValueError, match=f"{name} is missing there, "):
            arrays_to_read(without, some)
    some = {name: x for name, x in with_it.items() if name != "params_ema.bias"}
    with pytest.raises(ValueError, match="params_ema.bias is missing there"):
        arrays_to_read(with_it, some)


def test_the_model_is_named_before_the_optimizer():
    wanted, saved = named_arrays(_state(optax.sgd(1e-2))), named_arrays(_state())
    with pytest.raises(ValueError, match="^another optimizer wrote it: opt_state.0.count is a sc"):
        arrays_to_read(wanted, saved)
    wanted["params.bias"] = jnp.zeros(5)
    message = r"^params.bias is of the shape \(3,\) there, of the shape \(5,\) in this config"
    with pytest.raises(ValueError, match=message):
        arrays_to_read(wanted, saved)


def test_an_average_that_is_missing_is_a_copy():
    wanted, read = named_arrays(_state(with_ema=True)), named_arrays(_state())
    filled = fill_average(wanted, read)
    assert filled.keys() == wanted.keys()
    np.testing.assert_array_equal(filled["params_ema.blocks.w"], read["params.blocks.w"])
    read["params.blocks.w"].delete()
    assert np.all(np.array(filled["params_ema.blocks.w"]) == 1)
    found = fill_average(wanted, wanted)
    assert all(found[name] is wanted[name] for name in wanted)
