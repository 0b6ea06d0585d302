import pytest

from xlstm.visible_text import short_repr, visible, visible_lines


@pytest.mark.parametrize(
    "text, shown",
    [
        ("plain é 漢字 😀 \u200e[red]\\x1b", "plain é 漢字 😀 \u200e[red]\\x1b"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07\x08\x7f", r"\x1b]0;title\x07\x08\x7f"),
        ("\x00\x9b31m\x85\x9f\xa0", "\\x00\\x9b31m\\x85\\x9f\xa0"),
        ("a\rb", r"a\x0db"),
        ("\u202eabc\u202c\u2066\u2069", r"\u202eabc\u202c\u2066\u2069"),
        ("\udc1b", r"\udc1b"),
    ],
)
def test_what_acts_is_written_out(text, shown):
    assert visible(text) == visible_lines(text) == shown
    shown.encode("utf-8")


def test_lines_stay_where_there_may_be_several():
    assert visible_lines("a\n\tb\u2028\r\n") == "a\n\tb\u2028\\x0d\n"
    assert visible("a\n\tb\u2028") == r"a\x0a\x09b\u2028"


def test_a_text_in_pieces_is_shown_as_the_whole():
    text = "\x1b[31m\n\u202e\r"
    assert "".join(map(visible_lines, text)) == visible_lines(text)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, 10**3000, list(range(10**6)), {str(i): "x" * 10**5 for i in range(99)}]
)
def test_a_value_is_short(value):
    assert len(short_repr(value)) < 500


def test_a_value_is_shown_as_it_is():
    assert short_repr(["\x1b[0m", None, 1.5, {"a": float("nan")}]) == (
        r"['\x1b[0m', None, 1.5, {'a': nan}]"
    )
