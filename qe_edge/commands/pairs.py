"""`qe-edge pairs`: retrieval tells the better expansion from the worse."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    OutOption,
    WorkdirOption,
    emit,
    student_for,
    tell_split,
    took,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import several
from qe_edge.errors import BadArgument, QeEdgeError
from qe_edge.train.config import PairsConfig
from qe_edge.work.folder import Workdir


@flags_of(PairsConfig, "pairs", recipe=True)
def pairs(
    dataset: Annotated[
        str | None, typer.Option("--dataset", "-d", help="Judged queries, as NAME or NAME@SPLIT.")
    ] = None,
    expansions: Annotated[
        list[Path] | None,
        typer.Option("--expansions", "-e", help="Candidates (JSON Lines; default: what `teach` collected)."),
    ] = None,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[PairsConfig],
) -> None:
    """Score expansions by retrieval, and pair the better with the worse."""
    from qe_edge.retrieval.datasets import load_dataset
    from qe_edge.train.pair_report import describe
    from qe_edge.train.pairs import PAIRS, REPORT
    from qe_edge.train.pairs import pairs as verb
    from qe_edge.work.files import read_json

    dataset = dataset or settings.values.pop("dataset", None)
    named = settings.values.pop("expansions", [])
    config = settings.config()
    if not dataset:
        raise BadArgument("name the judged queries with --dataset")
    work = Workdir(workdir)
    files = expansions or [Path(name) for name in named]
    data = load_dataset(dataset)
    tell_split(dataset, data)
    if not files:
        files = [work.taught(str(data))]
        took("expansions", files[0], "what `teach` collected")
    folder = verb(dataset, files, config, out=out, workdir=work)
    report = read_json(folder / REPORT)
    following: list[object] = ["qe-edge", "train", "sft", *student_for(data.lang)]
    following += [word for file in files for word in ("--expansions", file)]
    following += [word for problem in config.accept for word in ("--accept", problem)]
    with suppress(QeEdgeError):  # where a student has learnt from these queries' texts already
        learnt = ("--adapter", work.newest_sft({data.name}))
        following = ["qe-edge", "train", "dpo", *learnt, "--pairs", folder / PAIRS]
    text = (
        f"{several(report['pairs'], 'pair')} of "
        f"{several(report['queries_with_pairs'], 'query', 'queries')} in {folder}\n{describe(report)}"
    )
    emit(
        json,
        "pairs",
        text,
        inputs={"dataset": dataset},
        artifacts={"folder": folder},
        metrics=report,
        following=following,
    )
