"""`qe-edge data`: look at data sets before you start, and bring your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import JsonOption, emit
from qe_edge.commands.own_data import data_judge, data_make, data_queries

data_app = typer.Typer(help="Look at data sets, and make your own.", no_args_is_help=True)
data_app.command("make")(data_make)
data_app.command("queries")(data_queries)
data_app.command("judge")(data_judge)


@data_app.command("list")
def data_list(json: JsonOption = False) -> None:
    """List the named data sets."""
    from qe_edge.retrieval.datasets import BUILTIN, SHORT_NAMES, data_home
    from qe_edge.retrieval.official import ORIGIN

    home = data_home()
    imported = sorted(path.parent.name for path in home.glob(f"[!.]*/{ORIGIN}"))
    lines = [f"{name:<16} ships with qe-edge" for name in BUILTIN]
    lines += [f"{name:<16} imported, in {home / name}" for name in imported]
    lines += [f"{name:<16} ir_datasets {target}" for name, target in SHORT_NAMES.items()]
    lines += ["", "Also: any folder in BEIR layout, any ir_datasets id; NAME@SPLIT picks a split."]
    emit(
        json,
        "data list",
        "\n".join(lines),
        metrics={"builtin": BUILTIN, "imported": imported, "short_names": SHORT_NAMES},
        following=("qe-edge", "data", "info", "demo-en"),
    )


@data_app.command("info")
def data_info(
    name: Annotated[str, typer.Argument(help="A data set, as NAME or NAME@SPLIT.")], json: JsonOption = False
) -> None:
    """Count a data set, and check that its judgments fit its documents."""
    import msgspec

    from qe_edge.retrieval.datasets import describe, load_collection, load_dataset, split_name, splits

    dataset = load_collection(name)
    if dataset.folder and splits(dataset.folder) and not dataset.queries:
        load_dataset(name)  # which says what the judgments lack
    if dataset.folder and "train" in splits(dataset.folder):  # a teacher is asked for these first
        name = f"{split_name(name)[0]}@train"
    asking = ("teach", "--dataset") if dataset.queries else ("data", "queries")
    # Without queries to train on there are none to take few-shot exemplars from.
    mode = ("--mode", "zero-shot") if dataset.queries and not name.endswith("@train") else ()
    info = msgspec.to_builtins(describe(dataset))
    if dataset.folder and (found := splits(dataset.folder)):
        info["splits"] = found
    info["fingerprint"] = dataset.fingerprint()
    emit(
        json,
        "data info",
        "\n".join(
            f"{key:<12} {', '.join(value) if key == 'splits' else value}" for key, value in info.items()
        ),
        metrics=info,
        following=("qe-edge", *asking, name, "--endpoint", "URL", "--model", "MODEL", *mode),
    )


@data_app.command("fetch")
def data_fetch(
    name: Annotated[str, typer.Argument(help="A data set, as NAME or NAME@SPLIT.")], json: JsonOption = False
) -> None:
    """Download a data set by ir_datasets.

    It shows its progress and keeps what it got.
    """
    from qe_edge.retrieval.datasets import load_dataset

    dataset = load_dataset(name)
    next(iter(dataset.documents()), None)  # ir_datasets downloads documents when the first is asked for
    text = f"{dataset}: {len(dataset.queries)} judged queries are here"
    emit(
        json,
        "data fetch",
        text,
        metrics={"name": str(dataset), "queries": len(dataset.queries)},
        following=("qe-edge", "data", "info", name),
    )


@data_app.command("import")
def data_import(
    name: Annotated[str, typer.Argument(help="Its name from now on, such as dl19 or miracl-zh.")],
    topics: Annotated[Path, typer.Option(help="Lines of query id, tab and text.")],
    qrels: Annotated[Path, typer.Option(help="TREC judgments: query id, 0, document id, grade.")],
    passages: Annotated[
        Path,
        typer.Option(
            help="collection.tsv, or JSON Lines of MS MARCO v2 or MIRACL; a file or folder, .gz or not."
        ),
    ],
    pool: Annotated[
        bool, typer.Option("--pool", help="The passages are only some of the collection's; figures say so.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Output folder (default: NAME in $QE_EDGE_DATA, or among the user's data)."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Make a data set from official topics, judgments and passages.

    Nothing is downloaded.
    """
    import msgspec

    from qe_edge.errors import BadArgument
    from qe_edge.retrieval.datasets import BUILTIN, data_home
    from qe_edge.retrieval.official import import_dataset

    if name in BUILTIN:
        raise BadArgument(f"{name} ships with qe-edge; choose another name")
    folder = out or data_home() / name
    origin = import_dataset(name, topics=topics, qrels=qrels, passages=passages, out=folder, pool=pool)
    lacking = f"{origin.missing_judged:,} judged passages and {origin.lost_queries} queries are left out"
    what = f"a pool; {lacking}" if origin.pool else "complete"
    text = f"{name} in {folder}: {origin.passages:,} passages, {what}"
    emit(
        json,
        "data import",
        text,
        artifacts={"folder": folder},
        metrics=msgspec.to_builtins(origin),
        following=("qe-edge", "data", "info", name),
    )
