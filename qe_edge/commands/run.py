"""`qe-edge run` and `demo`: the whole way at once."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.commands.bench import emit_bench
from qe_edge.commands.common import WORKDIR, JsonOption, WorkdirOption
from qe_edge.commands.flags import parsed
from qe_edge.errors import BadArgument
from qe_edge.work.folder import Workdir


def run(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file (TOML), or the name of one that ships with qe-edge.")
    ],
    data: Annotated[Path | None, typer.Option(help="What {data} stands for in the recipe's paths.")] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Hub id, folder or GGUF instead of the recipe's.")
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", "-d", help="Judged training queries, or a folder of notes, instead."),
    ] = None,
    expansions: Annotated[
        list[Path] | None,
        typer.Option("--expansions", "-e", help="Their expansions (default: what `teach` collected)."),
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", help="What the student is measured on instead.")
    ] = None,
    teacher: Annotated[
        list[Path] | None, typer.Option("--teacher", help="A teacher's expansions of the test queries.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Who writes queries and expansions for notes.")
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_BASE_URL", help="Where it is asked (default: on this machine)."),
    ] = None,
    extra: Annotated[
        str | None, typer.Option(help="More fields of its requests as JSON, as `teach --extra` takes them.")
    ] = None,
    passages: Annotated[
        int | None, typer.Option(min=1, help="Passages of the notes that get a query; 60 are a small try.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Print the recipe file, to make your own of it.")
    ] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Run a recipe: pairs, SFT, DPO, merge, export, bench and report. Run again, it goes on."""
    from qe_edge.bench.report.report import report as draw
    from qe_edge.pipeline import run_recipe
    from qe_edge.recipe import load_recipe, read_recipe, recipe_file
    from qe_edge.retrieval.datasets import load_dataset

    if show:
        print(recipe_file(recipe).read_text(encoding="utf-8"), end="")
        return
    work = Workdir(workdir)
    content = read_recipe(recipe, data=data)
    own, notes = "samples" in content, "notes" in content
    if notes and (expansions or test or teacher):
        raise BadArgument(
            "this recipe makes its own data of a folder of notes: name that with --dataset alone"
        )
    for name, value in {"model": model, "passages": passages, "extra": extra}.items():
        if value and not notes:
            raise BadArgument(f"this recipe takes no notes and asks no model: leave --{name} out")
    if own and expansions:
        raise BadArgument("this recipe's student learns from its own texts: leave --expansions out")
    if dataset and not (expansions or own or notes):
        expansions = [work.taught(str(load_dataset(dataset)))]
    files = [str(file) for file in expansions or ()]
    given: dict[str, dict[str, Any]] = {
        "samples": {"datasets": [dataset] if own and dataset else None},
        "pairs": {"dataset": None if own or notes else dataset, "expansions": files},
        "sft": {"expansions": files, "student": student},
        "bench": {"datasets": test, "teachers": [str(file) for file in teacher or ()]},
    }
    if notes:
        fields = parsed("extra", dict[str, Any], extra) if extra else None
        asked = {"model": model, "endpoint": endpoint, "extra": fields}
        given |= {"notes": {"folder": dataset}, "queries": asked | {"passages": passages}, "teach": asked}
    chosen = {name: {key: value for key, value in part.items() if value} for name, part in given.items()}
    loaded = load_recipe(recipe, data=data, given=chosen)
    out = run_recipe(loaded, workdir=work)
    html = draw([out["bench"]], out["bench"] / "report.html")
    emit_bench(json, "run", out["bench"], report=html)
    if not json:
        exported = out.get("export dpo", out["export sft"])
        smallest = min(exported.glob("[!.]*.gguf"), key=lambda file: file.stat().st_size)
        program = "qe-edge" if shutil.which("qe-edge") else sys.argv[0]
        question, searched = '"why do my ears pop on a plane"', "demo-en"
        if loaded.notes:
            question, searched = '"what you look for"', str(work.made_folder(Path(loaded.notes.folder)))
        print(
            f"model:  {smallest}\n\nNow try:\n"
            f"  {program} expand {question} --model {smallest}\n"
            f"  {program} search {question} --refine --dataset {searched} --model {smallest}"
        )


def demo(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Run the whole pipeline on the built-in student and collection: the recipe `demo`."""
    run("demo", workdir=workdir, json=json)
