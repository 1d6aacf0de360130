"""`qe-edge search`: what an expansion changes."""

from __future__ import annotations

from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    AnalyzerOption,
    JsonOption,
    ModelOption,
    PassagesOption,
    ReaderOption,
    WorkdirOption,
    emit,
    load_expander,
)
from qe_edge.errors import BadArgument


def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Where to look: NAME or folder.")
    ] = "demo-en",
    model: ModelOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without expansion.")] = False,
    feedback: Annotated[
        bool,
        typer.Option("--feedback", help="Expand by what the plain query finds, as the student weighs it."),
    ] = False,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine", help="Expand also by what the written query finds: write, search, read, search."
        ),
    ] = False,
    passages: PassagesOption = None,
    reader: ReaderOption = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Results to show.")] = 5,
    analyzer: AnalyzerOption = "",
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Search a data set with the expanded query, and show what the expansion changed."""
    import msgspec

    from qe_edge.serve.collection import CANDIDATES, Collection
    from qe_edge.serve.collection import search as verb

    if plain + feedback + refine > 1:
        raise BadArgument("give one of --plain, --feedback and --refine")
    if (passages or reader) and not (feedback or refine):
        raise BadArgument("--passages and --reader say what is read; give --feedback or --refine too")
    collection = Collection.open(dataset, workdir / "index", analyzer=analyzer)
    expander = None if plain else load_expander(model, workdir, passages=passages, reader=reader)
    hits, expanded = verb(query, collection, expander=expander, feedback=feedback, refine=refine, k=k)
    lines = []
    if expander:
        expander.close()
        lines.append(f"expansion: {expanded.summary() or f'none, since {expanded.fallback}'}\n")
    for hit in hits:
        before = "" if plain else f"  (plain: {hit.plain_rank or f'not in the first {CANDIDATES}'})"
        lines.append(f"{hit.rank:>2}. {hit.doc_id}{before}\n    {hit.text[:200]}")
    text = "\n".join(lines if hits else [*lines, "nothing found"])
    metrics = {
        "hits": msgspec.to_builtins(hits),
        "expansion": expanded.summary(),
        "fallback": expanded.fallback,
    }
    emit(json, "search", text, inputs={"query": query}, metrics=metrics)
