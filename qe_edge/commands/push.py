"""`qe-edge push`: an export to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, WorkdirOption, emit, took
from qe_edge.errors import NotFound
from qe_edge.work.folder import Workdir


def push(
    repo: Annotated[str, typer.Argument(help="The repository, OWNER/NAME; created if it isn't there.")],
    folder: Annotated[Path | None, typer.Argument(help="An export's folder (default: the newest).")] = None,
    result: Annotated[
        list[Path] | None,
        typer.Option(help="Bench results for the card (default: the newest, if it measured these files)."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch instead of main.")] = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Upload an export to the Hugging Face hub.

    Its card tells what was measured.
    """
    from qe_edge.bench.result import read_result
    from qe_edge.push import push as verb

    work = Workdir(workdir)
    if folder is None:
        folder = work.newest("export", named="its folder: qe-edge push OWNER/NAME FOLDER")
        took("export", folder)
    if result is None:
        try:
            result = [work.newest("bench")]
        except NotFound:
            result = []
    url = verb(folder, repo, [read_result(path) for path in result], private=private, revision=revision)
    files = sorted(file.name for file in folder.glob("*.gguf"))
    at = f"@{revision}" if revision else ""
    emit(
        json,
        "push",
        url,
        inputs={"folder": folder, "repo": repo},
        artifacts={"url": url},
        following=("qe-edge", "expand", "what causes tides", "--model", f"hf:{repo}/{files[0]}{at}")
        if files
        else ("python", "-m", "webbrowser", url),
    )
