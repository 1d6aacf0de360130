"""Building and searching a large index: seconds, memory and disk, ours beside bm25s and Tantivy.

    python -m qe_edge.bench.programs.index_speed --pool DIR/beir/trec-dl19-20-pool@dl20 --expansions FILE

The collection is synthetic: each document has the length of one of the pool's, and terms drawn from all of
the pool's, so that the share of documents that hold a term, which decides the cost, is natural; which terms
stand together is not. Its vocabulary is the pool's, some tenths of a real one's. Each way builds in a process
of its own, and searches in another.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, get_args

import msgspec
import numpy as np
import typer

from qe_edge.bench.child import in_child
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import note
from qe_edge.errors import require
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import K1, B, Index
from qe_edge.student.join import TEACHER_JOIN
from qe_edge.work.files import write_json
from qe_edge.work.machine import usable_cores

Way = Literal["ours", "ours-alone", "bm25s", "tantivy"]  # alone: in one process
SEARCHES = 200
K = 1000


class Task(msgspec.Struct, frozen=True):
    """What a child does."""

    do: Literal["build", "search"]
    way: Way
    pool: str
    expansions: str
    documents: int
    folder: str


class Done(msgspec.Struct, frozen=True):
    """What it took. `mb` is on disk; queries/s at depth K, one at a time, plain and expanded."""

    seconds: float
    peak_mb: float
    mb: float = 0.0
    plain_per_s: float = 0.0
    expanded_per_s: float = 0.0


def main(
    pool: Annotated[str, typer.Option(help="A collection with natural term statistics, and queries.")],
    expansions: Annotated[Path, typer.Option(help="Expansions of its queries.")],
    documents: Annotated[int, typer.Option(min=1000)] = 8_800_000,
    ways: Annotated[
        list[str] | None, typer.Option("--way", help="ours, ours-alone, bm25s or tantivy (default: ours).")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the indexes go (default: temporary).")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all that was measured to this JSON file.")] = None,
) -> None:
    """Print a table with a row for each way."""
    found = {}
    print(f"{documents:,} documents\n")
    print("| way | build min | peak GB | disk GB | open s | searching GB | plain /s | expanded /s |")
    print("| :-- | --: | --: | --: | --: | --: | --: | --: |")
    for way in ways or ["ours"]:
        if way not in get_args(Way):
            raise typer.BadParameter(f"no way {way!r}; there are: {', '.join(get_args(Way))}")
        with TemporaryDirectory(dir=folder) as place:
            shared: dict[str, Any] = {"way": way, "pool": pool, "expansions": str(expansions)}
            shared |= {"documents": documents, "folder": place}
            built, searched = _child("build", shared), _child("search", shared)
        cells = [built.seconds / 60, built.peak_mb / 1000, built.mb / 1000]
        cells += [searched.seconds, searched.peak_mb / 1000]
        figures = " | ".join(f"{value:.2f}" for value in cells)
        print(
            f"| {way} | {figures} | {searched.plain_per_s:.1f} | {searched.expanded_per_s:.1f} |", flush=True
        )
        found[way] = {"built": built, "searched": searched}
    if out:
        write_json(out, {"documents": documents, "found": found})


def _child(do: Literal["build", "search"], shared: dict[str, Any]) -> Done:
    note(f"{shared['way']}: {do}")
    return in_child(work, Task(do=do, **shared), what=f"that has {shared['way']} {do} an index")


def stream(task: Task) -> Iterator[tuple[str, str]]:
    """The synthetic documents, a few thousand in memory at a time."""
    words = [text.split() for _, text in load_dataset(task.pool).documents()]
    vocabulary = np.array(sorted({word for text in words for word in text}), dtype=object)
    number = {word: i for i, word in enumerate(vocabulary)}
    tokens = np.array([number[word] for text in words for word in text], np.int32)
    lengths = np.array([len(text) for text in words])
    draw, made = np.random.default_rng(0), 0
    while made < task.documents:
        chunk = draw.choice(lengths, min(5000, task.documents - made))
        drawn = vocabulary[tokens[draw.integers(0, len(tokens), chunk.sum())]]
        ends = np.cumsum(chunk)
        for length, end in zip(chunk.tolist(), ends.tolist(), strict=True):
            yield f"d{made}", " ".join(drawn[end - length : end])
            made += 1


def queries(task: Task) -> list[tuple[str, str]]:
    """Queries and expansions, again from the start until there are enough."""
    known = load_dataset(task.pool).queries
    rows = [(r.query, r.text) for r in read_jsonl(task.expansions, Expansion) if r.query_id in known]
    return [rows[i % len(rows)] for i in range(SEARCHES)]


def build(task: Task) -> None:
    folder = Path(task.folder)
    if task.way in ("ours", "ours-alone"):
        workers = usable_cores() if task.way == "ours" else 1
        Index.write(stream(task), folder, analyzer="english", workers=workers)
    elif task.way == "bm25s":
        import bm25s

        from qe_edge.text import get_analyzer

        analyze = get_analyzer("english")
        vocab: dict[str, int] = {}
        texts = [[vocab.setdefault(t, len(vocab)) for t in analyze(text)] for _, text in stream(task)]
        retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
        retriever.index((texts, vocab), show_progress=False)
        retriever.save(folder)
    else:
        tantivy = require("tantivy", "dev")
        schema = tantivy.SchemaBuilder().add_text_field("text", tokenizer_name="en_stem").build()
        writer = tantivy.Index(schema, path=task.folder).writer(heap_size=1_000_000_000)
        for _, text in stream(task):
            writer.add_document(tantivy.Document(text=text))
        writer.commit()
        writer.wait_merging_threads()


def search(task: Task) -> Done:
    """Open, then search plain and expanded queries one at a time for the best K."""
    asked = queries(task)
    start = time.perf_counter()
    if task.way in ("ours", "ours-alone"):
        index = Index.open(task.folder)
        opened = time.perf_counter() - start
        plain = [lambda q=q: index.search_text(q, join=TEACHER_JOIN, k=K) for q, _ in asked]
        expanded = [lambda q=q, e=e: index.search_text(q, e, join=TEACHER_JOIN, k=K) for q, e in asked]
    elif task.way == "bm25s":
        import bm25s

        from qe_edge.text import get_analyzer

        analyze = get_analyzer("english")
        retriever = bm25s.BM25.load(task.folder, mmap=True)
        opened = time.perf_counter() - start

        def retrieve(text: str) -> Any:
            return retriever.retrieve([analyze(text)], k=K, show_progress=False)

        plain = [lambda q=q: retrieve(q) for q, _ in asked]
        expanded = [lambda q=q, e=e: retrieve(" ".join([q] * 5 + [e])) for q, e in asked]
    else:
        tantivy = require("tantivy", "dev")
        found = tantivy.Index.open(task.folder)
        searcher = found.searcher()
        opened = time.perf_counter() - start

        def look(text: str) -> Any:
            words = "".join(c if c.isalnum() else " " for c in text.lower())
            return searcher.search(found.parse_query(words, ["text"]), K)

        plain = [lambda q=q: look(q) for q, _ in asked]
        expanded = [lambda q=q, e=e: look(" ".join([q] * 5 + [e])) for q, e in asked]
    rates = []
    for calls in (plain, expanded):
        calls[0]()  # what is read or compiled once
        begin = time.perf_counter()
        for call in calls:
            call()
        rates.append(len(calls) / (time.perf_counter() - begin))
    return Done(opened, peak_memory_mb(), plain_per_s=rates[0], expanded_per_s=rates[1])


def work(task: Task) -> Done:
    """In a child."""
    if task.do == "search":
        return search(task)
    start = time.perf_counter()
    build(task)
    size = sum(file.stat().st_size for file in Path(task.folder).rglob("*") if file.is_file())
    seconds = time.perf_counter() - start
    return Done(seconds, peak_memory_mb() + _peak_of_workers(task), size / 1e6)


def _peak_of_workers(task: Task) -> float:
    """As if each held as much as the largest of them."""
    if task.way != "ours" or sys.platform != "linux":
        return 0.0
    import resource

    return usable_cores() * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    typer.run(main)
