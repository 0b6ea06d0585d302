import jax
import numpy as np
import pytest

from xlstm.distributed.batches import split_batch


def test_parts_follow_each_other():
    batch = {"tokens": np.arange(24).reshape(6, 4), "other": (np.arange(6) > 2,)}
    parts = split_batch(batch, 3, "minibatches")
    assert jax.tree.structure(parts) == jax.tree.structure(batch)
    np.testing.assert_array_equal(parts["tokens"], np.arange(24).reshape(3, 2, 4))
    np.testing.assert_array_equal(parts["other"][0], np.arange(6).reshape(3, 2) > 2)


def test_as_many_parts_as_examples_and_only_one():
    assert split_batch(np.zeros((6, 5)), 6, "microbatches").shape == (6, 1, 5)
    assert split_batch(np.zeros((6, 5)), 1, "microbatches").shape == (1, 6, 5)


@pytest.mark.parametrize("num_parts", [4, 12])
def test_no_example_is_dropped(num_parts):
    with pytest.raises(ValueError, match=f"6 examples does not divide into {num_parts} halves"):
        split_batch(np.zeros((6, 5)), num_parts, "halves")


@pytest.mark.parametrize("num_parts", [0, -2])
def test_number_of_parts(num_parts):
    with pytest.raises(ValueError, match=f"num_halves={num_parts}: it must be at least 1"):
        split_batch(np.zeros((6, 5)), num_parts, "halves")


@pytest.mark.parametrize("other", [np.zeros(3), np.float32(0)])
def test_leaves_that_disagree_on_the_examples(other):
    with pytest.raises(ValueError, match="must agree on their leading axis"):
        split_batch({"x": np.zeros(6), "other": other}, 3, "halves")


def test_a_batch_without_arrays():
    with pytest.raises(ValueError, match="must agree on their leading axis"):
        split_batch({}, 3, "halves")
