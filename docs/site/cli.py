"""Print docs/cli.md: every command's help, rarely used options with it.

python docs/site/cli.py > docs/cli.md
"""

from __future__ import annotations

from typing import Any

import typer
from typer.cli import get_docs_for_click
from typer.core import TyperGroup
from typer.main import get_command

from qe_edge.cli import app


def page() -> str:
    """The whole page."""
    command = get_command(app)
    show_all(command)
    context = typer.Context(command, info_name="qe-edge")
    return get_docs_for_click(obj=command, ctx=context, name="qe-edge", title="Commands").strip() + "\n"


def show_all(command: Any) -> None:
    """Hide no option, as --help-all does."""
    for parameter in command.params:
        parameter.hidden = False
    if isinstance(command, TyperGroup):
        for below in command.commands.values():
            show_all(below)


if __name__ == "__main__":
    print(page(), end="")
