"""`qe-edge search`: what an expansion changes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    ModelOption,
    WorkdirOption,
    chosen_model,
    emit,
    exports_language,
    knows,
    last_words,
    one_that_knows,
    student_for,
    to_learn,
    took,
)
from qe_edge.commands.flags import Settings, flags_of
from qe_edge.errors import BadArgument
from qe_edge.runtime.expander import Expander
from qe_edge.serve.config import SearchConfig
from qe_edge.student.models import DEFAULT_STUDENT
from qe_edge.student.prompt import clean_query
from qe_edge.text import begun, detect_language

SHOWN = 200  # characters of a passage


@flags_of(SearchConfig, "")
def search(
    query: Annotated[str, typer.Argument(help="What to look for.")],
    model: ModelOption = None,
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
    *,
    settings: Settings[SearchConfig],
) -> None:
    """Search with the expanded query, and show what expansion changed."""
    import msgspec

    from qe_edge.serve.collection import CANDIDATES, Collection, warn_of_language
    from qe_edge.serve.collection import search as verb

    config = settings.config()
    if config.plain and model:
        raise BadArgument("--plain searches without a model: leave --model out")
    if model == "none":  # as `bench` takes it
        raise BadArgument("no model 'none'; --plain searches without a model")
    if query == "-":
        raise BadArgument("- is no query, and stdin is read by `qe-edge expand` alone")
    clean_query(query)  # a blank one is refused before the work
    if "dataset" not in settings.values:
        took("data set", config.dataset, "the default")
    collection = Collection.open(config.dataset, workdir / "index", analyzer=config.analyzer)
    model = None if config.plain else chosen_model(model, workdir, named=one_that_knows(query))
    expander = Expander.load(model, passages=config.passages, reader=config.reader) if model else None
    hits, expanded = verb(
        query, collection, expander=expander, feedback=config.feedback, refine=config.refine, k=config.k
    )
    lines, known, foreign = [], True, False
    if expander:
        known = knows(expander, query)
        lang = detect_language(" ".join(hit.text for hit in hits[:3]))
        foreign = bool(hits) and known and warn_of_language(config.dataset, lang, expander)
        expander.close()
        read_alone = config.refine and expanded.relevance and not expanded.text
        what = "nothing written, read alone: " if read_alone else "expansion: "
        lines.append(what + (expanded.summary() or f"none, since {expanded.fallback}"))
        if expanded.text and expanded.relevance:
            lines.append(f"and read:  {replace(expanded, text='').summary()}")
        lines[-1] += "\n"
    for hit in hits:
        before = "" if config.plain else f"  (plain: {hit.plain_rank or f'not in the first {CANDIDATES}'})"
        lines.append(f"{hit.rank:>2}. {hit.doc_id}{before}\n    {begun(hit.text, SHOWN)}")
    text = "\n".join(lines if hits else [*lines, "nothing found"])
    metrics = {
        "hits": msgspec.to_builtins(hits),
        "expansion": expanded.summary(),
        "terms": expanded.terms(),
        "fallback": expanded.fallback,
    }
    inputs = {"query": query, "dataset": config.dataset, "model": model}
    emit(
        json,
        "search",
        text,
        inputs=inputs,
        metrics=metrics,
        following=_following(query, config, workdir, model, found=bool(hits), known=known, foreign=foreign),
        following_to=sys.stderr,
    )


def _following(
    query: str,
    config: SearchConfig,
    workdir: Path,
    model: str | None,
    *,
    found: bool,
    known: bool,
    foreign: bool,
) -> tuple[object, ...]:
    """The next command, also where nothing was found, or the student lacks a language."""
    from qe_edge.retrieval.datasets import BUILTIN

    shown = ("qe-edge", "data", "info", config.dataset)
    demo = "demo-zh" if detect_language(query) == "zh" else "demo-en"
    if not found and config.dataset in BUILTIN and config.dataset != demo:
        how = ("--model", model) if model and known else ("--plain",)
        return ("qe-edge", "search", "--dataset", demo, *how, *last_words(query))
    if not known:
        return to_learn(query, workdir) or shown  # which says how a teacher is asked
    if not found:
        return shown
    if foreign:
        return ("qe-edge", "search", "--dataset", config.dataset, "--plain", *last_words(query))
    if model:
        reader = ("--reader", config.reader) if config.reader else ()
        return ("qe-edge", "serve", "--index", config.dataset, "--model", model, *reader)
    lang = detect_language(query)
    student = () if exports_language(workdir, lang) else ("--model", DEFAULT_STUDENT)
    if student and student_for(lang):  # another one is needed
        return to_learn(query, workdir) or shown
    return ("qe-edge", "search", "--dataset", config.dataset, *student, *last_words(query))
