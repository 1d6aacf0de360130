"""`qe-edge doctor`: what is installed, and what isn't."""

from __future__ import annotations

from qe_edge.commands.common import WORKDIR, JsonOption, WorkdirOption, emit


def doctor(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Show what is installed, what is missing and how to get it."""
    from qe_edge.doctor import describe, look

    found = look(workdir)
    emit(json, "doctor", describe(found), metrics=found, following=("qe-edge", "demo"))
