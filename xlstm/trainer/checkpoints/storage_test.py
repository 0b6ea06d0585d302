import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from xlstm.trainer.checkpoints.storage import check_storage_path, literal_path_handler
from xlstm.trainer.checkpoints.streamed_arrays import (
    StreamedArray,
    open_streamed_arrays,
    write_streamed_arrays,
)

_REFUSED = {
    "/gs/runs": "/gs means cloud storage",
    "/hf/runs": "/hf means cloud storage",
    "gs://bucket/runs": "looks like a URL of cloud storage",
    "s3://bucket/runs": "looks like a URL of cloud storage",
    "/runs/logs:/mine": "looks like a URL of cloud storage",
    "/runs/a\\b": "a backslash",
    "/runs/a.__lock/mine": "lock files",
    "/runs/\udcff": "not UTF-8",
    "/" + "/".join(["x" * 200] * 20): "too long",
}
_STRANGE = ["a[1]", "[", "a*", "a?", "a**b", "{a,b}", "%20#", "~", " a ", "a\nb", "a://b", "日本"]


@pytest.mark.parametrize("path", _REFUSED)
def test_a_path_that_cannot_work_is_refused_in_one_sentence(path):
    with pytest.raises(ValueError, match="checkpoints cannot be stored in ") as caught:
        check_storage_path(path)
    assert _REFUSED[path] in str(caught.value)
    assert "\n" not in str(caught.value)


def _write(path, value):
    write_streamed_arrays(
        path, {"x": StreamedArray((2, 3), 2, iter([np.full((1, 3), value, np.float32)] * 2))}
    )


@pytest.mark.parametrize("name", _STRANGE)
def test_all_other_characters_are_those_of_names(tmp_path, name):
    path = str(tmp_path / name / "arrays")
    check_storage_path(path)
    _write(path, 4)
    assert np.all(open_streamed_arrays(path, ["x"])["x"].read().result() == 4)
    with ocp.Checkpointer(literal_path_handler()) as checkpointer:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {"x": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=sharding)}
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(like, restore_args=restore_args)
        assert np.all(checkpointer.restore(path, args=args)["x"] == 4)
    assert os.listdir(tmp_path) == [name.split("/")[0]]


def test_a_pattern_takes_nothing_from_other_folders(tmp_path):
    """The pattern `a?` matches the folder `ab`, where another process is writing."""
    _write(str(tmp_path / "ab" / "arrays"), 5)
    shutil.move(tmp_path / "ab" / "arrays", tmp_path / "ab" / "arrays.orbax-checkpoint-tmp")
    processes = tmp_path / "ab" / "arrays.orbax-checkpoint-tmp"
    shutil.move(processes / "ocdbt.process_0", processes / "ocdbt.process_1")
    path = str(tmp_path / "a?" / "arrays")
    _write(path, 4)
    assert np.all(open_streamed_arrays(path, ["x"])["x"].read().result() == 4)
