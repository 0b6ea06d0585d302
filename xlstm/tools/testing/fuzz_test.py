"""A short fuzzing; `bazel run //xlstm/tools:fuzz` runs all of it."""

import dataclasses
import os
import random
import shutil

import pytest

from xlstm.testing.patience import PATIENCE
from xlstm.tools.testing import fuzz as fuzz_module
from xlstm.tools.testing.fuzz import KINDS, Fuzz
from xlstm.tools.testing.tool_worker import ACCEPTED, REJECTED, Answer

_CASES = 20
# The other tools read a checkpoint, for which they start another process.
_KINDS = [kind for kind in KINDS if KINDS[kind].tool == KINDS["index"].tool]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    fuzz = Fuzz(str(tmp_path_factory.mktemp("fuzz")), random.Random(5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz_module, "_SECONDS", PATIENCE)  # Only `bazel run` rejects slow cases.
        yield fuzz
    fuzz.close()


def test_changed_inputs_are_accepted_rightly_or_refused(fuzz):
    endings = set()
    for number in range(_CASES):
        case = fuzz.make_case(_KINDS[number % len(_KINDS)])
        answer, fault = fuzz.run(case)
        assert fault is None, f"{case.kind}: {case.what}: {fault}"
        endings.add(answer.ending)
    assert endings == {ACCEPTED, REJECTED}


def test_a_refusal_is_one_line_of_the_command(fuzz):
    case = fuzz.make_case("index", unchanged=True)
    os.truncate(os.path.join(case.folder, "model", "model.safetensors.index.json"), 9)
    case = dataclasses.replace(case, is_same=False)
    answer, fault = fuzz.run(case)
    assert (answer.ending, fault) == (REJECTED, None)
    assert fuzz.run_command(case, answer) is None
    wrong = Answer(ACCEPTED, "", 0.0, 0)
    assert fuzz.run_command(case, wrong).startswith("the command's status is 2: error: ")


def test_it_notices_what_is_wrong(fuzz):
    plain = fuzz.make_case("index", unchanged=True)
    answer, fault = fuzz.run(plain)
    assert (answer.ending, fault) == (ACCEPTED, None)
    shutil.rmtree(os.path.join(plain.folder, "out"))
    shutil.rmtree(os.path.join(plain.folder, "back"))
    wrong = dataclasses.replace(plain, is_same=False, is_wrong=True)
    assert fuzz.run(wrong)[1] == "it is accepted"
    # Its output exists already, so it is rejected now.
    assert fuzz.run(plain)[1].startswith("it is rejected: ")
    case = fuzz.make_case("index", unchanged=True)
    path = os.path.join(case.folder, "model")
    os.replace(os.path.join(path, "b.safetensors"), os.path.join(path, "a.safetensors"))
    assert fuzz.run(case)[1].startswith("it is rejected: ")
