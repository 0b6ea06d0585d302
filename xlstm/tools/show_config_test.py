import dataclasses
import subprocess
import sys

import pytest

from xlstm.tools import show_config
from xlstm.tools.config import field_comments, sections


def _run(*words):
    return subprocess.run(
        [sys.executable, "-m", show_config.__name__, *words],
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.fixture(scope="module")
def shown():
    result = _run("--config=smoke", "--config.mesh.tp=7")
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_every_field_is_printed_with_its_comment(shown):
    text = " ".join(shown.split())
    for section, section_class in sections().items():
        comments = field_comments(section_class)
        for field in dataclasses.fields(section_class):
            assert f"{section}.{field.name} " in text
            assert comments[field.name].split()[0] in text


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
