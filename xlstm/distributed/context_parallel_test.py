import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from xlstm.distributed.context_parallel import (
    combine_earlier,
    from_earlier,
    of_last_part,
    only_in_first_part,
)
from xlstm.distributed.hlo_collectives import find_collectives

SIZES = [1, 2, 3, 4, 5, 8]


def mesh_of(size):
    return Mesh(jax.devices()[:size], "cp")


def over_devices(function, size):
    """Returns a function of arrays whose leading axis is that of the devices."""

    def local(x):
        x = jax.tree.map(lambda x: x[0], x)
        return jax.tree.map(lambda y: y[None], function(x))

    spec = PartitionSpec("cp")
    run = jax.shard_map(local, mesh=mesh_of(size), in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run)


def concatenate(earlier, later):
    """Concatenates numbers, which are given with the power of ten of their digits."""
    return {
        "number": earlier["number"] * later["power"] + later["number"],
        "power": earlier["power"] * later["power"],
    }


def numbers_before(digits, reverse):
    """Concatenates the digits of the earlier devices, on each device."""
    identity = {"number": 0, "power": 1}
    x = {"number": digits, "power": jnp.full_like(digits, 10)}
    return combine_earlier(concatenate, x, identity, "cp", reverse=reverse)


def expected_numbers(size, reverse):
    digits = "".join(map(str, range(1, size + 1)))
    parts = [digits[at + 1 :][::-1] if reverse else digits[:at] for at in range(size)]
    return [int(part or 0) for part in parts], [10 ** len(part) for part in parts]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_earlier_parts_are_combined_in_order_and_in_few_messages(size, reverse):
    digits = jnp.arange(1, size + 1)
    compiled = over_devices(lambda x: numbers_before(x, reverse), size).lower(digits).compile()
    actual = compiled(digits)
    numbers, powers = expected_numbers(size, reverse)
    np.testing.assert_array_equal(actual["number"], numbers)
    np.testing.assert_array_equal(actual["power"], powers)
    collectives = find_collectives(compiled.as_text(), mesh_of(size))
    kinds = ["collective-permute"] * (1 + math.ceil(math.log2(size - 1)) if size > 1 else 0)
    assert [x.kind for x in collectives] == kinds


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("distance", [1, 2, 3, 4])
def test_values_of_an_earlier_part_arrive_in_one_message(distance, reverse):
    size = 4
    rng = np.random.default_rng(0)
    x = {
        "a": jnp.asarray(rng.standard_normal((size, 2, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((size, 5)), jnp.bfloat16),
    }
    fill = {"a": jnp.full((2, 3), 7.0), "b": -1.0}

    def receive(x):
        return from_earlier(x, fill, "cp", distance=distance, reverse=reverse)

    compiled = over_devices(receive, size).lower(x).compile()
    actual = compiled(x)
    for name, value in (("a", 7.0), ("b", -1.0)):
        filler = jnp.full_like(x[name][:distance], value)
        earlier = [filler, x[name][: size - distance]]
        if reverse:
            earlier = [x[name][distance:], filler]
        np.testing.assert_array_equal(actual[name], jnp.concatenate(earlier))
        assert actual[name].dtype == x[name].dtype
    messages = find_collectives(compiled.as_text(), mesh_of(size))
    assert len(messages) == (distance < size)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_values_of_the_last_part_are_on_all_devices(size):
    x = {"a": jnp.arange(2.0 * size).reshape(size, 2), "b": jnp.arange(size) + 0.5}
    # Elsewhere they do not matter, even if they are not numbers.
    x["a"] = x["a"].at[:-1].set(jnp.nan)
    actual = over_devices(lambda x: of_last_part(x, "cp"), size)(x)
    for name, values in x.items():
        np.testing.assert_array_equal(actual[name], jnp.broadcast_to(values[-1:], values.shape))


def test_only_the_first_part_keeps_its_values():
    x = jnp.arange(8.0).reshape(4, 2) + 1
    actual = over_devices(lambda x: only_in_first_part(x, "cp"), 4)(x)
    np.testing.assert_array_equal(actual, x.at[1:].set(0))


def test_without_the_axis_there_is_no_earlier_part():
    digit = jnp.array(3)
    assert numbers_before(digit, reverse=False) == {"number": 0, "power": 1}
    assert from_earlier(digit, 5, "cp") == 5
    assert of_last_part(digit, "cp") == only_in_first_part(digit, "cp") == 3
