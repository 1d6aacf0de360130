"""`qe-edge merge`: an adapter becomes a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, OutOption, WorkdirOption, emit, took_trained
from qe_edge.work.folder import Workdir


def merge(
    adapter: Annotated[Path | None, typer.Argument(help="A trained adapter (default: the newest).")] = None,
    join: Annotated[
        str | None, typer.Option(help="The join that travels with the student, such as mass:1.")
    ] = None,
    out: OutOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Merge an adapter into its base model: a plain Hugging Face folder."""
    from qe_edge.student.join import Join
    from qe_edge.train.merge import merge as verb
    from qe_edge.work.runs import read_record

    work = Workdir(workdir)
    if adapter is None:
        adapter = work.newest("dpo", "sft", named="what one of them wrote: qe-edge merge ADAPTER")
        took_trained("adapter", adapter)
    folder = verb(adapter, join=Join.parse(join) if join else None, out=out, workdir=work)
    checks = read_record(folder)["checks"]
    text = f"model in {folder} (logit cosine to base + adapter {checks['logit_cosine']})"
    emit(
        json,
        "merge",
        text,
        inputs={"adapter": adapter},
        artifacts={"model": folder},
        metrics=checks,
        following=("qe-edge", "export", folder, "--q4"),
    )
