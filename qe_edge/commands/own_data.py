"""`qe-edge data make`, `queries` and `judge`: from a folder of notes to a test collection."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    NamedOutOption,
    WorkdirOption,
    emit,
    emit_asked,
    took,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import note, several
from qe_edge.errors import BadArgument, NotFound
from qe_edge.student.models import DEFAULT_STUDENT
from qe_edge.train.synthetic.config import JudgeConfig, QueriesConfig
from qe_edge.work.folder import Workdir

if TYPE_CHECKING:
    from qe_edge.retrieval.datasets import Dataset

SHOWN = 5  # files that can't be read


def data_make(
    folder: Annotated[
        Path, typer.Argument(help="A folder of notes: text, Markdown, HTML, JSON Lines, PDF, Office.")
    ],
    words: Annotated[int, typer.Option(min=20, max=2000, help="Words of a passage, about.")] = 100,
    out: NamedOutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Make a collection from a folder of notes. Run it again to read what has changed."""
    from qe_edge.documents.folder import CORPUS, make_collection

    out = out or Workdir(workdir).made_folder(folder)
    made = make_collection(folder, out, words=words)
    bad = list(made.problems.values())
    left = ", ".join(f"{count} {suffix}" for suffix, count in sorted(made.unknown.items()))
    for line in bad[:SHOWN]:
        note(f"data make: {line}")
    if len(bad) > SHOWN:
        note(f"data make: {len(bad) - SHOWN} more files can't be read; --json lists them")
    text = f"{several(made.passages, 'passage')} of {several(made.files, 'file')} in {out}"
    text += f" ({several(made.unchanged, 'file')} as before)" if made.unchanged else ""
    text += f'\nsearch them: qe-edge search "WORDS" --dataset {out} --refine --model {DEFAULT_STUDENT}'
    text += f"\nleft out, since no text is known in them: {left}" if left else ""
    emit(
        json,
        "data make",
        text,
        inputs={"folder": folder},
        artifacts={"folder": out, "corpus": out / CORPUS},
        metrics=msgspec.to_builtins(made),
        warnings=bad,
        following=("qe-edge", "data", "queries", out, "--endpoint", "URL", "--model", "MODEL"),
    )


@flags_of(QueriesConfig, "queries")
def data_queries(
    folder: Annotated[
        Path, typer.Argument(help="A folder that `data make` made, or any with a corpus.jsonl.")
    ],
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[QueriesConfig],
) -> None:
    """Have a model write queries that your passages answer.

    Those are kept that find their passage again.
    """
    from qe_edge.train.synthetic.queries import write_queries

    if not settings.values.get("model"):
        raise BadArgument("name the model that writes them with --model")
    config = settings.config()
    outcome, report = write_queries(folder, config, workdir=Workdir(workdir))
    at = ("--endpoint", config.endpoint) if config.endpoint else ()
    text = f"{outcome.done} of {outcome.candidates} queries were written"
    if report:
        dropped = ", ".join(f"{count} {why}" for why, count in report.dropped.items())
        text = (
            f"{several(report.train, 'query', 'queries')} to train on, {report.test} to test on, in {folder}"
        )
        text += f"\ndropped: {dropped}" if dropped else ""
        text += "\nThey and their judgments are synthetic: what is measured by them says so."
    emit_asked(
        json,
        "data queries",
        text,
        outcome,
        inputs={"folder": folder, "model": config.model, "endpoint": config.endpoint},
        artifacts={"folder": folder},
        metrics=msgspec.to_builtins(report) if report else {},
        following=("qe-edge", "teach", "--dataset", f"{folder}@train", *at, "--model", config.model)
        if report and report.train
        else ("qe-edge", "bench", "--dataset", folder),
    )


@flags_of(JudgeConfig, "judge")
def data_judge(
    dataset: Annotated[
        str, typer.Argument(help="The queries whose results are graded, as NAME or NAME@SPLIT.")
    ],
    run: Annotated[
        list[str] | None,
        typer.Option(help="A TREC run to grade too: FILE or LABEL=FILE (default: the newest bench's)."),
    ] = None,
    out: NamedOutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[JudgeConfig],
) -> None:
    """Have a model grade what BM25, RM3 and the runs find.

    Its grades are compared with known judgments.
    """
    from qe_edge.bench.inputs import parse_run
    from qe_edge.retrieval.datasets import load_dataset
    from qe_edge.retrieval.trec import read_run
    from qe_edge.train.synthetic.judge import judge

    if not settings.values.get("model"):
        raise BadArgument("name the model that grades with --model")
    config, work = settings.config(), Workdir(workdir)
    data = load_dataset(dataset)
    files = dict(parse_run(text) for text in run) if run else _newest_runs(data, work)
    runs = {label: read_run(path) for label, path in files.items()}
    out = out or work.judged_folder(str(data))
    outcome, found, file = judge(data, runs, config, out=out, workdir=work)
    judged = f"{dataset.partition('@')[0]}@{file}"
    text = f"{outcome.done} of {outcome.candidates} grades were given"
    if found:
        text = f"{several(found.grades, 'grade')} in {file}, as {judged} judges with them"
        if found.pairs:
            text += f"\nagreement with the {found.pairs} known judgments among them: "
            of_systems = f"tau of {len(found.systems)} systems"
            kappas = {"kappa": found.kappa, "relevant or not": found.kappa_binary, of_systems: found.tau}
            text += ", ".join(f"{name} {value:.2f}" for name, value in kappas.items() if value is not None)
    following = ("qe-edge", "bench", "--dataset", judged, "--measure", "Judged@10")
    if found and not found.grades:  # another model may give some
        at = ("--endpoint", config.endpoint) if config.endpoint else ()
        following = ("qe-edge", "data", "judge", dataset, *at, "--model", "MODEL")
    emit_asked(
        json,
        "data judge",
        text,
        outcome,
        inputs={"dataset": str(data), "model": config.model, "endpoint": config.endpoint},
        artifacts={"judgments": file},
        metrics=msgspec.to_builtins(found) if found else {},
        following=following,
    )


def _newest_runs(data: Dataset, workdir: Workdir) -> dict[str, Path]:
    """The runs of the newest bench, if it was on this data set."""
    try:
        found = sorted(workdir.newest("bench").glob(f"runs/*-{data.fingerprint()[:8]}/*.trec"))
    except NotFound:
        found = []
    if found:
        took("runs", found[0].parents[2])
    else:
        note(
            "runs: BM25's and RM3's alone, as the newest bench (if any) isn't of this data; --run adds others"
        )
    return {path.stem: path for path in found}
