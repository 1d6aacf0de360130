"""The command line as tests of it call it."""

import re
import sys

import pytest
from typer.main import get_command

from qe_edge.cli import app, main


@pytest.fixture
def qe_edge(monkeypatch, capsys):
    """Run a command in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qe-edge", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        _advises_what_there_is(" ".join(map(str, arguments)), captured.err)
        return code, captured.out, captured.err

    return run


def _advises_what_there_is(asked, told):
    """Each option that is told is one of the command, or of one that is named with it, or was asked for."""
    if "in a recipe, options are settings" in told:
        return
    named = re.findall(r"(?:qe-edge |`(?!qe-edge))((?:[a-z]+ ?)+)", told)
    known = {"--help"}.union(*(_options_of(words.split()) for words in (asked, *named)))
    advised = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", told))
    assert {option for option in advised - known if option not in asked} == set(), told


def _options_of(words):
    command = get_command(app)
    for word in words:
        command = getattr(command, "commands", {}).get(word, command)
    return {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
