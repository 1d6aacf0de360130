"""`expand` and `search`: a student at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.commands.common import (
    WORKDIR,
    AnalyzerOption,
    JsonOption,
    ModelOption,
    PassagesOption,
    WorkdirOption,
    emit,
    took,
)
from qe_edge.console import note
from qe_edge.errors import BadArgument, BadInput, PartlyDone
from qe_edge.lines import cut, decoded
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.work.folder import Workdir


def load_expander(model: str | None, workdir: Path, **settings: Any) -> Expander:
    """The model that is named, else the smallest of the newest export: the one meant for the device."""
    from qe_edge.bench.inputs import default_models

    if model is None:
        models = default_models(Workdir(workdir))
        model = min(models, key=lambda path: Path(path).stat().st_size)
        took("model", model)
    return Expander.load(model, **settings)


def expand(
    queries: Annotated[list[str], typer.Argument(help="Queries; `-` reads one per line from stdin.")],
    model: ModelOption = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget (default: the model's own).")] = None,
    terms: Annotated[
        bool, typer.Option("--terms", help="Print weighted index terms instead of text.")
    ] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Expand queries with a student."""
    if queries == ["-"]:
        queries = [line for _, line in decoded(cut(sys.stdin.buffer), "<stdin>") if line.strip()]
        if not queries:
            raise BadInput("stdin holds no query")
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    with load_expander(model, workdir, budget_tokens=max_tokens) as expander:
        for query in queries:
            try:
                expanded = expander.expand(query)
            except BadInput as error:
                if len(queries) == 1:
                    raise
                failures.append(f"{query[:40]!r}: {error}")
                note(f"error: {failures[-1]}")
                continue
            rows.append(_row(expanded))
            if not json:
                if expanded.fallback:
                    note(f"{query[:40]!r} is to be searched as it is: {expanded.fallback}")
                print(_weighted(expanded.terms()) if terms else expanded.text, flush=True)
    if json:
        metrics = {"expansions": rows}
        status = "partial" if failures else "ok"
        emit(True, "expand", "", inputs={"model": model}, metrics=metrics, warnings=failures, status=status)
    if failures:
        raise typer.Exit(PartlyDone.exit_code)


def _row(expanded: ExpandedQuery) -> dict[str, Any]:
    return {
        "query": expanded.query,
        "text": expanded.text,
        "terms": expanded.terms(),
        "tokens": expanded.tokens,
        "finish_reason": expanded.finish_reason,
        "fallback": expanded.fallback,
        "prefill_s": round(expanded.prefill_s, 4),
        "decode_s": round(expanded.decode_s, 4),
    }


def _weighted(terms: dict[str, float]) -> str:
    return "  ".join(f"{term}^{weight:.3g}" for term, weight in terms.items())


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
    passages: PassagesOption = None,
    k: Annotated[int, typer.Option("-k", min=1, max=1000, help="Results to show.")] = 5,
    analyzer: AnalyzerOption = "",
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Search a data set with the expanded query, and show what the expansion changed."""
    import msgspec

    from qe_edge.serve.collection import CANDIDATES, Collection
    from qe_edge.serve.collection import search as verb

    if plain and feedback:
        raise BadArgument("give either --plain or --feedback")
    if passages is not None and not feedback:
        raise BadArgument("--passages says how many feedback reads; give --feedback too")
    collection = Collection.open(dataset, workdir / "index", analyzer=analyzer)
    expander = None if plain else load_expander(model, workdir, passages=passages)
    hits, expanded = verb(query, collection, expander=expander, feedback=feedback, k=k)
    lines = []
    if expander:
        expander.close()
        lines.append(f"expansion: {expanded.summary() or f'none, since {expanded.fallback}'}\n")
    for hit in hits:
        before = "" if plain else f"  (plain: {hit.plain_rank or f'not in the first {CANDIDATES}'})"
        lines.append(f"{hit.rank:>2}. {hit.doc_id}{before}\n    {hit.text[:200]}")
    text = "\n".join(lines) if hits else "nothing found"
    metrics = {
        "hits": msgspec.to_builtins(hits),
        "expansion": expanded.summary(),
        "fallback": expanded.fallback,
    }
    emit(json, "search", text, inputs={"query": query}, metrics=metrics)
