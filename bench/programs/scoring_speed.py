"""How fast are candidates scored? Ours beside `bm25s.BM25.retrieve` on the repeated string, in one run.

    python -m qe_edge.bench.programs.scoring_speed --data DIR [--documents 1000000]

DIR holds `beir/` and `expansions/`, as for the recipes. Every way gets the same candidates in the same order,
the query five times, top 10, and is checked to find the same scores. The ways take turns, round by round,
and the ratio is taken within each round, so that a machine whose speed wanders does not decide.

- search: from index terms to the top 10, one thread.
- all: from text to the top 10, on all cores: bm25s's numba on as many threads, ours in as many processes.
- pairs: all that `qe-edge pairs` does to score a candidate, nDCG@10 and keeping the score included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from qe_edge.console import note
from qe_edge.records import Expansion, read_jsonl
from qe_edge.retrieval.bulk import BulkSearch
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.index import K1, B, Index, IndexMeta, save_names
from qe_edge.retrieval.postings import write_postings
from qe_edge.student.join import TEACHER_JOIN
from qe_edge.text import Analyzer
from qe_edge.train.scoring import CHUNK, NDCG, score
from qe_edge.work.machine import machine, usable_cores

K = 10
REPEATS = int(TEACHER_JOIN.value)


class Scored(NamedTuple):
    """Documents as lists of terms, and candidates as (query, expansion)."""

    name: str
    documents: list[list[str]]
    candidates: list[tuple[str, str]]


def main(
    data: Annotated[Path, typer.Option(help="Folder with beir/ and expansions/.")],
    documents: Annotated[
        int, typer.Option(help="Size of the synthetic collection; 0 leaves it out.")
    ] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Turns of each way.")] = 5,
) -> None:
    """Print a table of candidates per second."""
    host = machine()
    print(f"{host['cpu']}, {host['cores']} cores; candidates per second, median of {rounds} rounds\n")
    print("| collection | from | bm25s | bm25s numba | ours | ours / bm25s | ours / numba |")
    print("| :-- | :-- | --: | --: | --: | --: | --: |")
    pool = real(data, "trec-dl19-20-pool@test", "dl19", "dl20")
    makers: list[Callable[[], Scored]] = [lambda: real(data, "scifact@test", "scifact"), lambda: pool]
    if documents:
        makers.append(lambda: synthetic(pool, documents))
    for make in makers:
        collection = make()
        with TemporaryDirectory() as folder:
            measure(collection, Path(folder) / "index", rounds)
    for dataset, expansions in (("scifact@test", "scifact"), ("trec-dl19-20-pool@dl20", "dl20")):
        whole(data, dataset, expansions)


def whole(data: Path, dataset: str, expansions: str) -> None:
    """The rate of scoring as `pairs` does it, on 20,000 candidates: the real ones with letters left out."""
    loaded = load_dataset(str(data / "beir" / dataset))
    rows = list(read_jsonl(data / "expansions" / f"{expansions}.jsonl", Expansion))
    items = [(row.query_id, row.text[cut:]) for cut in range(20_000 // len(rows) + 1) for row in rows][
        :20_000
    ]
    with TemporaryDirectory() as folder:
        index = Index.for_dataset(loaded, Path(folder) / "index")
        start = time.perf_counter()
        score(items, loaded, index, TEACHER_JOIN, [NDCG], cache=Path(folder) / "scores")
        rate = len(items) / (time.perf_counter() - start)
    print(f"| {Path(dataset).name.partition('@')[0]} | pairs | – | – | {rate:,.0f} | – | – |", flush=True)


def real(data: Path, dataset: str, *expansions: str) -> Scored:
    """A collection with the teachers' candidates of its queries, query by query."""
    from qe_edge.text import get_analyzer

    loaded = load_dataset(str(data / "beir" / dataset))
    files = [data / "expansions" / f"{name}.jsonl" for name in expansions]
    rows = sorted(
        (row for file in files for row in read_jsonl(file, Expansion)), key=lambda row: row.query_id
    )
    analyze = get_analyzer("english")
    return Scored(
        Path(dataset).name.partition("@")[0],
        [analyze(text) for _, text in loaded.documents()],
        [(row.query, row.text) for row in rows if row.query_id in loaded.queries],
    )


def synthetic(pool: Scored, size: int) -> Scored:
    """`size` documents in which every term is as frequent as in the pool; its own candidates.

    A document has the length and the terms that drawing from the pool's documents gives, each term drawn
    from another document: the share of documents that hold a term, which decides the cost of a search,
    is natural; which terms stand together is not.
    """
    draw = np.random.default_rng(0)
    lengths = np.array([len(terms) for terms in pool.documents])
    vocabulary = sorted({term for terms in pool.documents for term in terms})
    number = {term: i for i, term in enumerate(vocabulary)}
    tokens = np.array([number[term] for terms in pool.documents for term in terms], dtype=np.int32)
    names = np.array(vocabulary, dtype=object)
    documents = []
    for length in draw.choice(lengths, size):
        documents.append(names[tokens[draw.integers(0, len(tokens), length)]].tolist())
    return Scored(f"synthetic, {size:,} documents", documents, pool.candidates)


def measure(collection: Scored, folder: Path, rounds: int) -> None:
    """Two rows of the table."""
    import bm25s

    vocab: dict[str, int] = {}
    ids = [[vocab.setdefault(term, len(vocab)) for term in terms] for terms in collection.documents]
    retriever = bm25s.BM25(k1=K1, b=B, method="lucene")
    retriever.index((ids, vocab), show_progress=False)
    note(f"{collection.name}: {len(ids)} documents, {len(collection.candidates)} candidates")
    del ids
    folder.mkdir()
    documents = ((str(i), " ".join(terms)) for i, terms in enumerate(collection.documents))
    known = Analyzer("split", str.split)  # the terms are analysed already
    found = write_postings(documents, known, folder, k1=K1, b=B)
    save_names(folder, *found, IndexMeta("english", K1, B, len(collection.documents)))

    index = Index.open(folder)
    terms = [(index.analyze(query), index.analyze(text)) for query, text in collection.candidates]
    _check(index, terms, retriever)
    cores = usable_cores()
    searches = {
        "numpy": lambda: _retrieve(retriever, "numpy", terms, 1),
        "numba": lambda: _retrieve(retriever, "numba", terms, 1),
        "ours": lambda: _search(BulkSearch(index), terms),
    }
    _row(collection, "search", searches, rounds)
    with ExitStack() as stack:
        pool = stack.enter_context(_pool(folder, cores))
        everything = {
            "numpy": lambda: _from_text(retriever, "numpy", index, collection, cores),
            "numba": lambda: _from_text(retriever, "numba", index, collection, cores),
            "ours": lambda: list(pool.imap_unordered(_work, _chunks(collection.candidates))),
        }
        _row(collection, "all", everything, rounds)


def _retrieve(retriever: Any, backend: str, terms: list[tuple[list[str], list[str]]], threads: int) -> Any:
    retriever.backend = backend  # both read the same index
    repeated = [query * REPEATS + expansion for query, expansion in terms]
    # The default backend loses by threads (0.6 times its speed with two on the pool), so it gets none.
    if backend == "numpy":
        threads = 0
    return retriever.retrieve(repeated, k=K, n_threads=threads, show_progress=False)


def _search(bulk: BulkSearch, terms: Sequence[tuple[list[str], list[str]]]) -> list[Any]:
    return bulk.search(terms, TEACHER_JOIN, K)


def _from_text(retriever: Any, backend: str, index: Index, collection: Scored, threads: int) -> Any:
    terms = [(index.analyze(query), index.analyze(text)) for query, text in collection.candidates]
    return _retrieve(retriever, backend, terms, threads)


def _pool(folder: Path, processes: int) -> Any:
    from multiprocessing import get_context

    return get_context("spawn").Pool(processes, _start, (folder,))


_bulk: BulkSearch
_analyze: Callable[[str], list[str]]


def _start(folder: Path) -> None:
    global _bulk, _analyze
    index = Index.open(folder)
    _bulk, _analyze = BulkSearch(index), index.analyze


def _work(chunk: list[tuple[str, str]]) -> list[Any]:
    return _search(_bulk, [(_analyze(query), _analyze(text)) for query, text in chunk])


def _chunks(candidates: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    for i in range(0, len(candidates), CHUNK):
        yield candidates[i : i + CHUNK]


def _check(index: Index, terms: list[tuple[list[str], list[str]]], retriever: Any) -> None:
    """Every way must find the same top 10; equal scores may be ordered otherwise, so scores are compared."""
    ours = _search(BulkSearch(index), terms)
    for backend in ("numpy", "numba"):
        found = _retrieve(retriever, backend, terms, 1).scores
        for ranking, scores in zip(ours, found, strict=True):
            mine = [score for _, score in ranking] + [0.0] * (K - len(ranking))
            np.testing.assert_allclose(mine, scores, rtol=1e-4)


def _row(collection: Scored, what: str, ways: dict[str, Callable[[], Any]], rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():  # compiled and warm
        way()
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    count = len(collection.candidates)
    rates = " | ".join(f"{count / median(taken):,.0f}" for taken in seconds.values())
    ratios = []
    for other in ("numpy", "numba"):
        each = [a / b for a, b in zip(seconds[other], seconds["ours"], strict=True)]
        ratios.append(f"{median(each):.1f} ({min(each):.1f} to {max(each):.1f})")
    print(f"| {collection.name} | {what} | {rates} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    typer.run(main)
