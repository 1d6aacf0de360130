"""`qe-edge run` and `demo`: the whole way at once."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.bench import emit_bench
from qe_edge.commands.common import WORKDIR, JsonOption, WorkdirOption, command_line, emit, last_words
from qe_edge.commands.flags import DataOption, Settings, flags_of
from qe_edge.errors import QeEdgeError
from qe_edge.overrides import Overrides
from qe_edge.work.folder import Workdir


@flags_of(Overrides, "")
def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file (TOML), or the name of one that ships with qe-edge.")
    ],
    data: DataOption = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe file, to make your own of it.")
    ] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[Overrides],
) -> None:
    """Run a recipe: pairs, SFT, DPO, merge, export, bench, report. Run it again to go on where it stopped."""
    from qe_edge.recipe import recipe_file

    if show:
        text = recipe_file(recipe).read_text(encoding="utf-8")
        emit(
            json,
            "run",
            text.rstrip(),
            metrics={"recipe": text},
            following=("qe-edge", "run", recipe),
            following_to=sys.stderr,
        )
        return
    _run(recipe, settings.config(), data, workdir, json, own=(*Overrides.__struct_fields__, "data"))


def demo(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Run the whole pipeline on what ships with it: the recipe `demo`."""
    _run("demo", Overrides(), None, workdir, json, own=())


def _in_a_recipe(message: str, recipe: str, own: tuple[str, ...]) -> str:
    """A message, and where the options are that it advises and that are none of the command's `own`."""
    named = set(re.findall(r"--([a-z][a-z-]*)", re.sub(r"`[^`]*`", "", message)))
    if named <= {*own, "workdir"}:
        return message
    return f"{message} (in a recipe, options are settings: `qe-edge run {recipe} --show` prints them)"


def _run(
    recipe: str, overrides: Overrides, data: Path | None, workdir: Path, json: bool, *, own: tuple[str, ...]
) -> None:
    from qe_edge.bench.report.report import report as draw
    from qe_edge.pipeline import run_recipe
    from qe_edge.recipe import load_recipe, read_recipe
    from qe_edge.retrieval.datasets import load_dataset

    work = Workdir(workdir)
    given = overrides.sections(read_recipe(recipe, data=data), work)
    loaded = load_recipe(recipe, data=data, given=given)
    try:
        out = run_recipe(loaded, workdir=work)
    except QeEdgeError as error:
        error.args = (_in_a_recipe(str(error), recipe, own),)
        raise
    html = draw([out["bench"]], out["bench"] / "report.html")
    emit_bench(json, "run", out["bench"], report=html)
    if not json:
        exported = out.get("export dpo", out["export sft"])
        smallest = min(exported.glob("[!.]*.gguf"), key=lambda file: file.stat().st_size)
        searched = work.made_folder(Path(loaded.notes.folder)) if loaded.notes else loaded.bench.datasets[0]
        question = next(iter(load_dataset(str(searched)).queries.values()))
        expand = ("qe-edge", "expand", "--model", smallest, *last_words(question))
        flags = ("--refine", "--dataset", searched, "--model", smallest)
        search = ("qe-edge", "search", *flags, *last_words(question))
        print(f"model:  {smallest}\nnext:   {command_line(expand)}\n        {command_line(search)}")
