import itertools

import pytest

from xlstm.models.xlstm_parallel.pattern import find_pattern, parse_ratio


@pytest.mark.parametrize(
    "kinds, groups, repeats",
    [
        ("mmmm", [("m", 1)], 4),
        ("s", [("s", 1)], 1),
        ("mmmsmmms", [("m", 3), ("s", 1)], 2),
        ("msms", [("m", 1), ("s", 1)], 2),
        ("smmmm", [("s", 1), ("m", 4)], 1),
        ("mmsmsmmsms", [("m", 2), ("s", 1), ("m", 1), ("s", 1)], 2),
    ],
)
def test_the_shortest_pattern_is_found(kinds, groups, repeats):
    pattern = find_pattern(kinds)
    assert [(group.kind, group.length) for group in pattern.groups] == groups
    assert pattern.repeats == repeats
    assert pattern.is_uniform == (len(set(kinds)) == 1)
    # Indices in the sequence and within the kind agree with counting.
    for group in pattern.groups:
        assert kinds[group.first : group.first + group.length] == group.kind * group.length
        assert group.first_of_kind == kinds[: group.first].count(group.kind)
    assert pattern.counts == {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    assert pattern.length() * repeats == len(kinds)


def test_every_short_sequence_is_its_pattern_repeated():
    for size in range(1, 8):
        for kinds in itertools.product("ms", repeat=size):
            pattern = find_pattern(kinds)
            once = "".join(group.kind * group.length for group in pattern.groups)
            assert once * pattern.repeats == "".join(kinds)


def test_the_ratio_s_notation():
    assert parse_ratio("[7:1]") == (7, 1)
    assert parse_ratio("[0:1]") == (0, 1)
    for text in ("7:1", "[7:1", "[7-1]", "[-1:1]", "[0:0]", "[1:1:1]", "[ 1:1]"):
        with pytest.raises(ValueError, match="expected a form such as"):
            parse_ratio(text)
