"""`doctor` and `data`: look before you start."""

from __future__ import annotations

from typing import Annotated

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, WorkdirOption, emit

data_app = typer.Typer(help="Look at data sets.", no_args_is_help=True)


def doctor(workdir: WorkdirOption = WORKDIR, json: JsonOption = False) -> None:
    """Show what is installed, what is missing and how to get it."""
    from qe_edge.doctor import describe
    from qe_edge.doctor import doctor as look

    found = look(workdir)
    emit(json, "doctor", describe(found), metrics=found)


@data_app.command("list")
def data_list(json: JsonOption = False) -> None:
    """List the named data sets."""
    from qe_edge.datasets import BUILTIN, SHORT_NAMES

    lines = [f"{name:<16} ships with qe-edge" for name in BUILTIN]
    lines += [f"{name:<16} ir_datasets {target}" for name, target in SHORT_NAMES.items()]
    lines += ["", "Also: any folder in BEIR layout, any ir_datasets id; NAME@SPLIT picks a split."]
    emit(json, "data list", "\n".join(lines), metrics={"builtin": BUILTIN, "short_names": SHORT_NAMES})


@data_app.command("info")
def data_info(
    name: Annotated[str, typer.Argument(help="A data set, as NAME or NAME@SPLIT.")], json: JsonOption = False
) -> None:
    """Count a data set, and check that its judgments fit its documents."""
    import msgspec

    from qe_edge.datasets import describe, load_dataset

    dataset = load_dataset(name)
    info = msgspec.to_builtins(describe(dataset)) | {"fingerprint": dataset.fingerprint()}
    emit(json, "data info", "\n".join(f"{key:<12} {value}" for key, value in info.items()), metrics=info)
