"""Where the time of a query goes: plain search, prefill, decode, and twice search and read.

    python -m qe_edge.bench.programs.query_time STUDENT.gguf --reader ENCODER.gguf --dataset DIR@dl20

Each number of threads has a process of its own; queries come one at a time, the first one being left out.
"""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Annotated

import msgspec
import numpy as np
import typer

from qe_edge.bench.child import in_child
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.prf import read_texts
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.work.folder import Workdir

PARTS = ("plain search", "prefill", "decode", "search", "read", "all")


class Task(msgspec.Struct, frozen=True):
    """What a child process measures; 0 threads stand for the default."""

    model: str
    reader: str
    dataset: str
    queries: int
    budget: int
    passages: int
    threads: int


def main(
    model: Annotated[str, typer.Argument(help="A student's GGUF.")],
    reader: Annotated[str, typer.Option(help="An encoder's GGUF.")],
    dataset: Annotated[str, typer.Option()] = "demo-en",
    queries: Annotated[int, typer.Option(min=2)] = 40,
    budget: Annotated[int, typer.Option(help="Tokens that are written at most.")] = 32,
    passages: Annotated[int, typer.Option()] = 10,
    threads: Annotated[list[int] | None, typer.Option(help="Repeat it; 0 is the default.")] = None,
) -> None:
    """Print a table: milliseconds at the median and the 95th percentile."""
    print(f"{model}, {reader}, {dataset}: {budget} tokens at most, {passages} passages; ms, p50 / p95\n")
    print("| threads |" + "".join(f" {part} |" for part in PARTS))
    print("| --: |" + " --: |" * len(PARTS))
    for count in threads or [0]:
        task = Task(model, reader, dataset, queries, budget, passages, count)
        times = in_child(measure, task, what=f"of {count or 'free'} threads")
        cells = [np.percentile(times[part], [50, 95]) * 1000 for part in PARTS]
        print(f"| {count or 'free cores'} |" + "".join(f" {p50:.0f} / {p95:.0f} |" for p50, p95 in cells))


def measure(task: Task) -> dict[str, list[float]]:
    """Seconds of each part, by query."""
    data = load_dataset(task.dataset)
    index = Index.for_dataset(data, Workdir().root / "index")
    texts = read_texts(data, set(index.ids))
    searching = 0.0

    def search(query: ExpandedQuery) -> list[str]:
        nonlocal searching
        start = time.perf_counter()
        found = [texts[doc_id] for doc_id, _ in index.search(query.terms(index.meta.analyzer), task.passages)]
        searching += time.perf_counter() - start
        return found

    times: dict[str, list[float]] = defaultdict(list)
    expander = Expander.load(
        task.model,
        reader=task.reader,
        threads=task.threads or None,
        budget_tokens=task.budget,
        passages=task.passages,
    )
    with expander:
        for query in list(data.queries.values())[: task.queries + 1]:
            start, searching = time.perf_counter(), 0.0
            index.search_text(query, join=DEFAULT_JOIN)
            plain = time.perf_counter() - start
            start = time.perf_counter()
            written = expander.expand(query)
            writing = time.perf_counter() - start
            expander.refine(query, search, written=written)
            whole = time.perf_counter() - start
            reading = whole - writing - searching
            parts = (plain, written.prefill_s, writing - written.prefill_s, searching, reading, whole)
            for part, seconds in zip(PARTS, parts, strict=True):
                times[part].append(seconds)
    return {part: values[1:] for part, values in times.items()}


if __name__ == "__main__":
    typer.run(main)
