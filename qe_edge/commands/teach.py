"""`qe-edge teach`: candidate expansions from a teacher, or from a file made elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    NamedOutOption,
    WorkdirOption,
    emit,
    emit_asked,
    student_for,
    tell_split,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import warn
from qe_edge.errors import BadArgument
from qe_edge.records import Expansion, configured, read_jsonl
from qe_edge.train.teach.config import TeachConfig
from qe_edge.work.folder import Workdir

if TYPE_CHECKING:
    from qe_edge.retrieval.datasets import Dataset


@flags_of(TeachConfig, "teach")
def teach(
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Whose queries to expand: NAME or NAME@SPLIT.")
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(help="Or a file of queries without judgments: JSON Lines with _id and text."),
    ] = None,
    import_file: Annotated[
        Path | None, typer.Option("--import", help="Take the expansions in this file instead of asking.")
    ] = None,
    format: Annotated[
        str,
        typer.Option(help="Its format: querygym, query2doc or jsonl (our own)."),
    ] = "jsonl",
    out: NamedOutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[TeachConfig],
) -> None:
    """Ask a teacher for candidate expansions. Run it again to ask for what is missing."""
    from qe_edge.train.teach.teach import EXPANSIONS
    from qe_edge.train.teach.teach import teach as verb

    data = _queries(dataset, queries)
    out = out or Workdir(workdir).teach_folder(str(data) if data else import_file.stem if import_file else "")
    if import_file is not None:
        _import(import_file, dataset, data, out, format, json, settings)
        return
    if not settings.values.get("model") or (data is None and not settings.shown):
        unnamed = [] if data else ["the queries with --dataset or --queries"]
        unnamed += [] if settings.values.get("model") else ["the teacher's model with --model"]
        raise BadArgument(f"name {', and '.join(unnamed)}")
    config = settings.config()
    assert data is not None
    outcome = verb(data, config, out=out)
    text = f"{outcome.done} of {outcome.candidates} candidates are in {out / EXPANSIONS}"
    rows = list(read_jsonl(out / EXPANSIONS, Expansion)) if outcome.done else []
    following = _following(dataset, data, out / EXPANSIONS, rows, config.model)
    if _often_cut(rows, config.model):
        told = "many were cut: ask with a larger --max-tokens"
        if data.split != "test":
            told += ", or have `pairs` and `train sft` take them as they are, with --accept cut"
        warn(told)
    elif rows and all(row.problem for row in rows if row.model == config.model):
        warn(f"no answer of {config.model} can be used: look at the texts in {out / EXPANSIONS}")
        queried = ("--dataset", dataset) if dataset else ("--queries", queries)
        following = ("qe-edge", "teach", *queried, "--endpoint", config.endpoint or "URL", "--model", "MODEL")
    emit_asked(
        json,
        "teach",
        text,
        outcome,
        inputs={"dataset": str(data), "model": config.model, "endpoint": config.endpoint},
        artifacts={"expansions": out / EXPANSIONS},
        metrics={},
        following=following,
    )


def _often_cut(rows: Sequence[Expansion], model: str) -> bool:
    problems = [row.problem for row in rows if row.model == model]
    return problems.count("cut") > len(problems) / 4


def _following(
    dataset: str | None, data: Dataset, file: Path, rows: Sequence[Expansion], model: str
) -> Sequence[object]:
    """What to do with the candidates: those of test queries are to compare with, not to train on."""
    accept = ("--accept", "cut") if _often_cut(rows, model) else ()
    single = len(rows) <= len(data.queries)
    if not dataset or (single and data.split != "test"):  # there are no pairs
        of_one = ("--teacher-model", model) if any(row.model != model for row in rows) else ()
        return ("qe-edge", "train", "sft", *student_for(data.lang), "--expansions", file, *of_one, *accept)
    if data.split == "test":
        return ("qe-edge", "bench", "--dataset", dataset, "--teacher", file)
    return ("qe-edge", "pairs", "--dataset", dataset, *accept)


def _import(
    file: Path,
    dataset: str | None,
    data: Dataset | None,
    out: Path,
    format: str,
    json: bool,
    settings: Settings[TeachConfig],
) -> None:
    """Take what was made elsewhere; of the settings only those count that say what it is."""
    from qe_edge.train.teach.importing import ImportConfig, import_expansions
    from qe_edge.train.teach.teach import EXPANSIONS

    given: dict[str, Any] = {"format": format}
    given |= {name: settings.values[name] for name in ("model", "keep_bad") if name in settings.values}
    if modes := settings.values.get("mode"):
        given["mode"] = ",".join(modes)
    config = configured(ImportConfig, given)
    counts = import_expansions(file, config, data, out=out)
    rows = list(read_jsonl(out / EXPANSIONS, Expansion))
    text = ", ".join(f"{count} {what}" for what, count in counts.items())
    emit(
        json,
        "teach",
        f"{text}: {out / EXPANSIONS}",
        artifacts={"expansions": out / EXPANSIONS},
        metrics=dict(counts),
        following=_following(dataset, data, out / EXPANSIONS, rows, config.model or rows[-1].model)
        if data
        else ("qe-edge", "train", "sft", "--expansions", out / EXPANSIONS),
    )


def _queries(dataset: str | None, queries: Path | None) -> Dataset | None:
    from qe_edge.retrieval.datasets import load_dataset, load_queries

    if dataset and queries:
        raise BadArgument("give either --dataset or --queries")
    if dataset:
        data = load_dataset(dataset)
        tell_split(dataset, data)
        return data
    return load_queries(queries) if queries else None
