import types

import jax
import pytest
from absl.testing import flagsaver

from xlstm.tools.benchmarks import kernel_report
from xlstm.tools.benchmarks.candidates import Shape
from xlstm.tools.benchmarks.kernel_report import (
    Counts,
    Resources,
    compile_pass,
    count,
    h100,
    parse_ptxas,
    passes,
)

REPORT = """\
ptxas warning : Registers are spilled to local memory in function 'kernel', 56 bytes spill stores, \
60 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    56 bytes stack frame, 56 bytes spill stores, 60 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 56 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 315.221 ms
"""


def test_ptxas_report():
    assert parse_ptxas(REPORT) == Resources(registers=168, spilled=60)
    assert parse_ptxas(REPORT.replace("56", "0").replace("60", "0")) == Resources(168, 0)
    with pytest.raises(ValueError, match="neither registers nor spills, but: 'nothing'"):
        parse_ptxas("nothing\n")


def test_the_passes_are_those_of_the_mlstm():
    found = passes(Shape(1, 2, 128, 64, 128))
    names = ["forward", "states", "dv", "dq", "dk", "forward, states kept"]
    assert [item.name for item in found] == names
    # One head that is cut into segments, which start from states of their own.
    found = passes(Shape(1, 1, 1024, 64, 128))
    assert [item.name for item in found[:2]] == ["states", "forward"]
    assert found[0].options.segments == found[1].options.segments == 4


def test_work():
    """Two heads of 128 tokens, 64 and 128 features, in chunks of 64 tokens."""
    work = {item.name: count(item) for item in passes(Shape(1, 2, 128, 64, 128))}
    q, v, gates = 256 * 64 * 2, 256 * 128 * 2, 256 * 8 * 4 + 4 * 4
    states, pairs, numbers = 2 * 64 * 128 * 2, 4 * 64 * 64 * 4, 256 * 4
    # Half of the pairs for the scores and for their product with x; the state is read and updated.
    useful = 256 * (64 * (64 + 128) + 4 * 64 * 128)
    # All pairs, with the scores for each warpgroup's 64 of 128 features.
    done = 256 * (2 * 64 * (2 * 64 + 128) + 4 * 64 * 128)
    assert work["forward"] == Counts(useful, done, 2 * q + v + gates + v + numbers)
    kept = Counts(useful, done, 2 * q + v + gates + v + numbers + states)
    assert work["forward, states kept"] == kept
    update = 256 * 2 * 64 * 128
    assert work["states"] == Counts(update, update, q + v + gates + states)
    # Overlaps: a number for each token and each warpgroup's features; the last state is float32.
    last = 2 * 64 * 128 * 4
    # And h, whose products with dh are numbers like the overlaps.
    num_bytes = 2 * q + 3 * v + gates + states + last + pairs + 4 * numbers
    assert work["dv"] == Counts(useful, done, num_bytes)
    # The same with 128 features in the scores, which are computed for each 32 of 64 features.
    done = 256 * (2 * 64 * (2 * 128 + 64) + 4 * 64 * 128)
    vector = 4 * 64 * 4
    num_bytes = 2 * v + 2 * q + q + gates + vector + 2 * numbers
    assert work["dq"] == Counts(useful, done, num_bytes)
    # Once more the state, in every second chunk, and its sums.
    again, crossings = 256 * 64 * 128, 256 // 2 * 2 * 4
    num_bytes += 2 * pairs + numbers + crossings
    assert work["dk"] == Counts(useful + again, done + again, num_bytes)


def test_without_the_plugin(monkeypatch):
    monkeypatch.setattr(kernel_report, "_PLUGINS", ("no_such_plugin",))
    with pytest.raises(ValueError, match="plugin.* is not installed: use --config=cuda13"):
        h100()


def test_an_error_of_the_compiler_is_one_sentence(monkeypatch):
    def fail():
        raise jax.errors.JaxRuntimeError("no compiler\nhas been found")

    class Jitted:
        lower = staticmethod(lambda inputs: types.SimpleNamespace(compile=fail))

    item = passes(Shape(1, 2, 128, 64, 128))[0]
    monkeypatch.setattr(jax, "jit", lambda function: Jitted)
    with pytest.raises(ValueError, match="forward does not compile: no compiler .--config=cuda13"):
        compile_pass(item, jax.devices()[0])


@pytest.mark.parametrize(("most", "status"), [("60", 0), ("59", 1)])
def test_spills_decide_the_exit_status(most, status, monkeypatch, capsys):
    monkeypatch.setattr(kernel_report, "h100", lambda: jax.devices()[0])
    monkeypatch.setattr(kernel_report, "compile_pass", lambda item, device: REPORT)
    arguments = {"shapes": "1x2x128x64x128", "most_spilled": most}
    with flagsaver.as_parsed(**arguments):
        if status:
            with pytest.raises(SystemExit, match="1"):
                kernel_report.main([""])
        else:
            kernel_report.main([""])
    out, err = capsys.readouterr()
    (dq,) = (line.split() for line in out.splitlines() if " dq " in line)
    # Shared memory: two chunks of a and b, of x and partner of two warpgroups, states, gates.
    shared = 2 * 2 * 64 * 128 * 2 + 2 * 2 * 2 * 64 * 32 * 2 + 2 * 128 * 32 * 2 + 2048 + 1024
    expected = ["128x64", "32", "2", "2", "2", f"{shared / 1024:.0f}", "2", "168", "60"]
    assert dq[2 : 2 + len(expected)] == expected
    assert ("expected at most 59" in err) == bool(status)
