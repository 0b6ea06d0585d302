import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from xlstm.models.shared.parameters import boxed_parameter


class Scale(nn.Module):
    """One parameter."""

    @nn.compact
    def __call__(self, x):
        return x * boxed_parameter(self, "scale", nn.initializers.ones, (3,), ("tp",))


def test_is_created_in_a_box_and_read_with_or_without():
    x = jnp.arange(3.0)
    y, variables = Scale().init_with_output(jax.random.key(0), x)
    box = variables["params"]["scale"]
    assert isinstance(box, nn.Partitioned) and box.names == ("tp",)
    np.testing.assert_array_equal(y, x)
    boxed = {"params": {"scale": box.replace(value=box.value * 2)}}
    plain = {"params": {"scale": jnp.full(3, 2.0)}}
    for variables in (boxed, plain):
        np.testing.assert_array_equal(Scale().apply(variables, x), 2 * x)


def test_can_be_read_inside_shard_map():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tp",))
    variables = Scale().init(jax.random.key(0), jnp.ones(3))
    spec = jax.sharding.PartitionSpec("tp")
    apply = jax.shard_map(Scale().apply, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    np.testing.assert_array_equal(jax.jit(apply)(variables, jnp.arange(3.0)), np.arange(3.0))
