import os
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from xlstm.trainer.checkpoints.storage import restore_arguments
from xlstm.trainer.checkpoints.streamed_arrays import (
    StreamedArray,
    open_streamed_arrays,
    write_streamed_arrays,
)

_STACK = np.arange(4 * 3 * 5, dtype=np.float32).reshape(4, 3, 5)
_WHOLE = np.linspace(0, 1, 7, dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """An array of four chunks, each transposed in memory, and one of a single chunk."""
    path = str(tmp_path_factory.mktemp("arrays") / "arrays")
    parts = (np.ascontiguousarray(block.T).T[None] for block in _STACK)
    arrays = {
        "stack": StreamedArray((4, 3, 5), 4, parts),
        "whole": StreamedArray((7,), 1, iter([_WHOLE])),
    }
    write_streamed_arrays(path, arrays)
    return path


def test_they_are_read_in_parts(path):
    arrays = open_streamed_arrays(path, ["whole", "stack"])
    assert arrays.keys() == {"whole", "stack"}
    assert arrays["stack"].shape == (4, 3, 5)
    # Each chunk can be read alone.
    assert arrays["stack"].chunk_layout.read_chunk.shape == (1, 3, 5)
    np.testing.assert_array_equal(arrays["stack"][2].read().result(), _STACK[2])
    np.testing.assert_array_equal(arrays["stack"][3].T.read().result(), _STACK[3].T)
    np.testing.assert_array_equal(arrays["whole"].read().result(), _WHOLE)


def test_they_are_read_whole_as_jax_arrays(path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"stack": jax.ShapeDtypeStruct((4, 3, 5), np.float32, sharding=sharding)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        stack = checkpointer.restore(path, args=restore_arguments(like))["stack"]
    assert {name: x.shape for name, x in saved.items()} == {"stack": (4, 3, 5), "whole": (7,)}
    assert isinstance(stack, jax.Array)
    np.testing.assert_array_equal(stack, _STACK)


def test_one_part_is_in_memory_at_a_time(tmp_path):
    parts = []

    def make():
        for value in range(20):
            assert sum(part() is not None for part in parts) <= 1
            part = np.full((1, 8, 8), value, np.float32)
            parts.append(weakref.ref(part))
            yield part

    write_streamed_arrays(str(tmp_path / "arrays"), {"x": StreamedArray((20, 8, 8), 20, make())})
    assert len(parts) == 20


def test_what_a_part_raises_is_raised(tmp_path):
    def make():
        yield np.zeros((1, 2), np.float32)
        raise ValueError("the second is missing")

    with pytest.raises(ValueError, match="the second is missing"):
        write_streamed_arrays(str(tmp_path / "arrays"), {"x": StreamedArray((2, 2), 2, make())})
    assert not os.path.exists(tmp_path / "arrays")
