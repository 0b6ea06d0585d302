import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from xlstm.trainer.base.nonfinite import count_nonfinite, nonfinite_text


def test_they_are_counted_and_named():
    weights = np.ones((3, 4), np.float32)
    weights[0, 1], weights[2, 3] = np.nan, -np.inf
    params = {
        "a": {"kernel": nn.Partitioned(jnp.array(weights), ("tp", None)), "bias": jnp.ones(3)},
        "b": jnp.array([1e38, np.inf], jnp.bfloat16),
    }
    counts = count_nonfinite(params)
    assert counts == {"a.kernel": 2, "b": 1}
    assert nonfinite_text(counts) == "numbers are infinite or NaN: 2 in a.kernel, 1 in b"
    assert count_nonfinite({"a": jnp.ones(3)}) == {}


def test_a_few_stand_for_many():
    text = nonfinite_text({f"{i}\x1b": 1000 * i for i in range(1, 9)})
    assert text.startswith(r"numbers are infinite or NaN: 1,000 in 1\x1b, 2,000 in 2")
    assert text.endswith(r", 5,000 in 5\x1b and more in 3 others")
