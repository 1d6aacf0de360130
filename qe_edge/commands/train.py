"""`qe-edge train`: SFT, then DPO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    OutOption,
    WorkdirOption,
    emit,
    took,
    took_trained,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.console import is_main_process, several
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.work.files import MANIFEST, read_json
from qe_edge.work.folder import Workdir, check_learnt

ShowOption = Annotated[
    bool, typer.Option("--show-example", help="Print the first row as it would be trained on, and stop.")
]
train_app = typer.Typer(help="Train a student: SFT, then DPO.", no_args_is_help=True)


@train_app.command("sft")
@flags_of(SftConfig, "sft", recipe=True)
def train_sft(
    expansions: Annotated[
        list[Path] | None,
        typer.Option(
            "--expansions",
            "-e",
            help="Expansions (JSON Lines; default: what `teach` collected, of one data set).",
        ),
    ] = None,
    show_example: ShowOption = False,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[SftConfig],
) -> None:
    """Fine-tune a student on expansions, a teacher's or its own. Run it again after Ctrl-C to go on."""
    from qe_edge.train.sft import example, sft

    named = settings.values.pop("expansions", [])
    config = settings.config()
    work = Workdir(workdir)
    files = expansions or [Path(name) for name in named]
    if not files:
        files = [work.only_taught()]
        took("expansions", files[0], "what `teach` collected")
    if "student" not in settings.values:
        took("student", config.student, "the default")
    if show_example:
        shown = example(files, config, workdir=work)
        emit(json, "train sft", shown.rstrip(), metrics={"example": shown})
        return
    folder = sft(files, config, out=out, workdir=work)
    _end_training(
        json,
        "train sft",
        folder,
        ("qe-edge", "train", "dpo", "--adapter", folder) if _pairs_for(work, folder) else (),
    )


def _pairs_for(work: Workdir, student: Path) -> bool:
    """Whether a bare `train dpo` would find pairs of what the student learnt from."""
    from qe_edge.records import Pair, read_jsonl
    from qe_edge.train.pairs import PAIRS

    try:
        check_learnt(student, {row.dataset for row in read_jsonl(work.newest_pairs(student) / PAIRS, Pair)})
    except QeEdgeError:
        return False
    return True


@train_app.command("dpo")
@flags_of(DpoConfig, "dpo", recipe=True)
def train_dpo(
    pairs: Annotated[
        Path | None, typer.Option(help="A pairs.jsonl (default: the newest, where all are of one data set).")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(help="An SFT folder (default: the newest, where all learnt from the pairs' data set)."),
    ] = None,
    show_example: ShowOption = False,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[DpoConfig],
) -> None:
    """Align the SFT student with retrieval's own preferences. Run it again after Ctrl-C to go on."""
    from qe_edge.records import Pair, read_jsonl
    from qe_edge.train.base_model import open_trained
    from qe_edge.train.dpo import dpo, example
    from qe_edge.train.pairs import PAIRS

    config = settings.config()
    work = Workdir(workdir)
    taken = pairs is None
    if adapter is not None:
        open_trained(adapter)  # a wrong one is told before what goes with it
    if pairs is None:
        pairs = work.newest_pairs(adapter) / PAIRS
    datasets = {row.dataset for row in read_jsonl(pairs, Pair)}
    if not datasets:
        raise BadInput("holds no pair; `qe-edge pairs` writes pairs.jsonl", path=pairs)
    if taken:
        took("pairs", pairs, f"the newest, of {read_json(pairs.parent / MANIFEST)['settings']['dataset']}")
    if adapter is None:
        adapter = work.newest_sft(datasets)
        took_trained("adapter", adapter)
    elif taken:
        check_learnt(adapter, datasets)
    if show_example:
        shown = example(pairs, adapter, config)
        emit(json, "train dpo", shown.rstrip(), metrics={"example": shown})
        return
    _end_training(json, "train dpo", dpo(pairs, adapter, config, out=out, workdir=work))


def _end_training(json: bool, command: str, folder: Path, following: Sequence[object] = ()) -> None:
    from qe_edge.train.hardware import leave_group
    from qe_edge.work.runs import read_record

    leave_group()
    if not is_main_process():
        return
    record = read_record(folder)
    metrics = record["metrics"] | {name: record[name] for name in ("rows", "rows_seen", "dropped")}
    rows, seen = record["rows"], record["rows_seen"]
    learnt = several(rows, "row") if seen == rows else f"{seen} of {several(rows, 'row')}"
    text = f"student in {folder} ({learnt}, mean loss {record['metrics']['train_loss']:.3f})"
    emit(
        json,
        command,
        text,
        inputs=record["inputs"],
        artifacts={"adapter": folder},
        metrics=metrics,
        following=following or ("qe-edge", "merge", folder),
    )
