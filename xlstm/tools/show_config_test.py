import dataclasses
import io
import subprocess
import sys

import pytest
from rich.console import Console

from xlstm.testing.patience import PATIENCE
from xlstm.tools import show_config
from xlstm.tools.config import field_comments
from xlstm.trainer.llm.config import RunConfig, sections


def _run(*words):
    return subprocess.run(
        [sys.executable, "-m", show_config.__name__, *words],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture(scope="module")
def shown():
    result = _run("--config=smoke", "--config.mesh.tp=7")
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_every_field_is_one_whole_line_with_its_comment(shown):
    lines = shown.splitlines()
    for section, section_class in sections().items():
        comments = field_comments(section_class)
        for field in dataclasses.fields(section_class):
            (line,) = [x for x in lines if x.startswith(f"{section}.{field.name} ")]
            assert line.endswith(comments[field.name])
    num_fields = sum(len(dataclasses.fields(section)) for section in sections().values())
    assert len(lines) == num_fields + 2  # The title and the heading.


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_shows_the_fields_at_any_width(width):
    options = {"color_system": None, "markup": False, "highlight": False}
    console = Console(file=io.StringIO(), force_terminal=True, width=width, **options)
    rows = list(show_config.field_rows(RunConfig()))
    rows[0] = rows[0]._replace(value="another")
    show_config.print_fields(console, "name", rows)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert lines[0] == "name" and max(map(len, lines)) <= width
    for row in rows:
        assert row.field in text
        assert set(row.meaning.split()) <= set(text.split())  # No word is cut.
    assert f"(default {rows[0].default})" in text or width == 200


def test_values_and_defaults_are_printed(shown):
    rows = {words[0]: words[1:] for words in map(str.split, shown.splitlines()) if words}
    assert rows["model.embedding_dim"][:2] == ["32", "128"]
    assert rows["model.vocab_size"][:2] == ["256", "256"]
    assert rows["mesh.tp"][:2] == ["7", "1"]


@pytest.mark.parametrize(
    "words, named",
    [
        (["--config.model.embeding_dim=3"], "did you mean model.embedding_dim?"),
        (["smoke"], "unexpected arguments: smoke"),
    ],
    ids=str,
)
def test_bad_input(words, named):
    result = _run(*words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and named in line
