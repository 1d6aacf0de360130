"""`qe-edge expand`: a student at work."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    ModelOption,
    WorkdirOption,
    chosen_model,
    emit,
    knows,
    last_words,
    measured_on,
    one_that_knows,
    tell_next,
    to_learn,
)
from qe_edge.console import note, warn
from qe_edge.errors import BadArgument, BadInput, PartlyDone
from qe_edge.lines import cut, decoded
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.prompt import clean_query
from qe_edge.text import begun, detect_language

SHOWN = 60  # characters of a query in a message, which a long one would hide


def expand(
    queries: Annotated[
        list[str],
        typer.Argument(
            help="What to expand; `-` alone reads a query per line from stdin, and prints a line for each."
        ),
    ],
    model: ModelOption = None,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Token budget (default: the model's own).")
    ] = None,
    terms: Annotated[
        bool, typer.Option("--terms", help="Print weighted index terms instead of text.")
    ] = False,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Expand queries with a student."""
    piped = queries == ["-"]
    if "-" in queries and not piped:
        raise BadArgument("- reads queries from stdin and stands alone: leave the others out, or -")
    if piped:
        queries = [line for _, line in decoded(cut(sys.stdin.buffer), "<stdin>")]
        if not any(map(str.strip, queries)):
            raise BadInput("stdin holds no query")
    if not piped and len(queries) > 1 and all(query.isascii() and query.isalpha() for query in queries):
        note("each word is a query of its own; one of several words stands in quotes")
    for file in filter(os.path.isfile, queries):
        warn(f"{file} is taken for a query; `qe-edge expand - < {shlex.quote(file)}` reads queries from it")
    if len(queries) == 1:
        clean_query(queries[0])  # a blank one is refused before the work
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    model = chosen_model(model, workdir, named=one_that_knows(queries[0]))
    with Expander.load(model, budget_tokens=budget_tokens) as expander:
        for query in queries:
            if piped and not query.strip():
                if not json:
                    print(flush=True)  # so that lines of queries and of texts can be set side by side
                continue
            try:
                expanded = expander.expand(query)
            except BadInput as error:
                if len(queries) == 1:
                    raise
                failures.append(f"{begun(query, SHOWN)!r}: {error}")
                note(f"error: {failures[-1]}")
                if piped and not json:
                    print(flush=True)
                continue
            rows.append(_row(expanded))
            if not json:
                if expanded.fallback:
                    note(f"{begun(query, SHOWN)!r} is to be searched as it is: {expanded.fallback}")
                print(_weighted(expanded.terms()) if terms else expanded.text, flush=True)
    if json:
        metrics = {"expansions": rows}
        status = "partial" if failures else "ok"
        emit(
            True,
            "expand",
            "",
            inputs={"model": model},
            metrics=metrics,
            errors=failures,
            status=status,
        )
    elif rows:
        query = rows[0]["query"]
        demo = "demo-zh" if detect_language(query) == "zh" else measured_on(Path(model).parent)
        known = knows(expander, query)
        how = ("--model", model) if known else ("--plain",)
        searched = ("qe-edge", "search", "--dataset", demo, *how, *last_words(query))
        if not rows[0]["terms"]:  # it has no word to be searched for
            searched = ("qe-edge", "data", "info", demo)
        tell_next((not known and to_learn(query, workdir)) or searched, sys.stderr)
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
