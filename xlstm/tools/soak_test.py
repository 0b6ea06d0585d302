"""A small part of the soak; `bazel run //xlstm/tools:soak` is the whole."""

import json
import pathlib
import random
import shutil

import pytest

from xlstm.tools.soak import Soak, SoakConfig

_CONFIG = SoakConfig(num_steps=300, checkpoint_interval=10, steps_between_injuries=40)


@pytest.fixture(scope="module")
def soak(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soak")
    return Soak(str(folder), _CONFIG, random.Random(0))


def test_a_run_that_is_hurt_ends_as_one_that_is_not(soak):
    kinds = ["SIGTERM", "flipped byte", "SIGKILL"]
    injuries = soak.hurt("hurt", kinds)
    # It may be at its end before the last, and one that is alone is not damaged.
    assert injuries and len(injuries) >= 2
    assert set(injuries) <= set(kinds)


def test_the_soak_notices_what_is_wrong(soak):
    folder = pathlib.Path(soak.folder)
    shutil.copytree(folder / "undisturbed", folder / "copy")
    soak.compare("copy")
    metrics = folder / "copy" / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    for wrong in (
        rows[:-5] + rows[-4:],
        rows[:50] + rows[49:],
        rows[:-1] + [json.dumps(json.loads(rows[-1]) | {"val_loss": 5.0}) + "\n"],
    ):
        metrics.write_text("".join(wrong))
        with pytest.raises(AssertionError, match="copy"):
            soak.compare("copy")
