"""`expand` and `search`: a student at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.commands.common import WORKDIR, JsonOption, ModelOption, WorkdirOption, emit, took
from qe_edge.errors import BadInput
from qe_edge.expander import Expander
from qe_edge.workdir import Workdir


def _expander(model: str | None, workdir: Path, max_tokens: int | None = None) -> Expander:
    from qe_edge.bench.harness import default_models

    if model is None:
        models = default_models(Workdir(workdir))
        # The smallest file is the one meant for the device.
        model = min(models, key=lambda path: Path(path).stat().st_size)
        took("model", model)
    return Expander.load(model, max_tokens=max_tokens)


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
        queries = [line.strip() for line in sys.stdin if line.strip()]
        if not queries:
            raise BadInput("stdin holds no query")
    with _expander(model, workdir, max_tokens) as expander:
        rows: list[dict[str, Any]] = [
            {
                "query": query,
                "text": expanded.text,
                "terms": expanded.terms(),
                "tokens": expanded.tokens,
                "finish_reason": expanded.finish_reason,
                "prefill_s": round(expanded.prefill_s, 4),
                "decode_s": round(expanded.decode_s, 4),
            }
            for query, expanded in zip(queries, map(expander.expand, queries), strict=True)
        ]
    shown = (
        "  ".join(f"{term}^{weight:.3g}" for term, weight in row["terms"].items()) if terms else row["text"]
        for row in rows
    )
    emit(json, "expand", "\n".join(shown), inputs={"model": model}, metrics={"expansions": rows})


def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    dataset: Annotated[
        str, typer.Option("--dataset", "-d", help="Where to look: NAME or folder.")
    ] = "demo-en",
    model: ModelOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Without expansion.")] = False,
    k: Annotated[int, typer.Option("-k", min=1, help="Results to show.")] = 5,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Search a data set with the expanded query, and show what the expansion changed."""
    import msgspec

    from qe_edge.search import search as verb

    expander = None if plain else _expander(model, workdir)
    hits, expanded = verb(query, dataset, expander=expander, cache=workdir / "index", k=k)
    if expander:
        expander.close()
    lines = [f"expansion: {expanded.text}\n"] if expanded else []
    for hit in hits:
        before = "" if plain else f"  (plain: {hit.plain_rank or f'not in the first {k}'})"
        lines.append(f"{hit.rank:>2}. {hit.doc_id}{before}\n    {hit.text[:200]}")
    text = "\n".join(lines) if hits else "nothing found"
    emit(json, "search", text, inputs={"query": query}, metrics={"hits": msgspec.to_builtins(hits)})
