"""`qe-edge prune`: a model keeps the tokens that its student needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, OutOption, WorkdirOption, emit
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.export.config import PruneConfig
from qe_edge.work.folder import Workdir


@flags_of(PruneConfig, "prune")
def prune(
    model: Annotated[str, typer.Argument(help="A merged model folder, or a base model to be trained.")],
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[PruneConfig],
) -> None:
    """Leave out tokens that given texts don't use: a smaller model.

    What it makes can be trained (`train sft --student`), exported and pruned again.
    """
    from qe_edge.export.prune import prune as verb
    from qe_edge.student.spec import read_spec
    from qe_edge.train.base_model import untrained
    from qe_edge.work.runs import read_record

    config, work = settings.config(), Workdir(workdir)
    is_student = Path(model).is_dir() and read_spec(Path(model)) is not None
    source = Path(model) if is_student else untrained(model, work)
    folder = verb(source, config, out=out, workdir=work)
    found = {name: value for name, value in read_record(folder).items() if name in METRICS}
    emit(
        json,
        "prune",
        f"model in {folder}: {found['tokens']:,} of {found['of_tokens']:,} tokens, "
        f"{found['parameters'] / 1e6:.0f} of {found['of_parameters'] / 1e6:.0f} million weights; "
        f"{found['covered']:.1%} of the tokens of the texts stay as they are",
        inputs={"model": model},
        artifacts={"model": folder},
        metrics=found,
        following=("qe-edge", "export", folder, "--q4"),
    )


METRICS = ("tokens", "of_tokens", "parameters", "of_parameters", "counted", "covered", "checks")
