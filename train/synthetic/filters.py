"""Which of a teacher's queries are kept: readable ones that find their passage, each said once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qe_edge.console import progress
from qe_edge.retrieval.datasets import Dataset, read_corpus
from qe_edge.retrieval.dense import DenseIndex
from qe_edge.retrieval.index import Index
from qe_edge.runtime.reader import Encoder
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.text import analyzer_for, count_words, detect_language, get_analyzer
from qe_edge.work.files import sha256
from qe_edge.work.folder import Workdir
from qe_edge.work.machine import usable_cores

LONGEST = 32  # words of a query
NEAR_DUPLICATE = 0.8  # share of index terms in common
_LABEL = re.compile(
    r"^\W*((search )?query|search|question|keywords|搜索|查询|问题|关键词)\s*[:：]\s*", re.IGNORECASE
)
_OF_THE_TEXT = re.compile(r"\b(this|the) (text|passage)\b|这段(文字|话)|(文|段落)中|本文", re.IGNORECASE)


class KnownItem(NamedTuple):
    """A query and the one document that is known to answer it."""

    query_id: str
    text: str
    document: str


def clean_answer(text: str) -> str:
    """A query as it was meant: its first line, without quotation marks, list marks and labels around it."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    line = _LABEL.sub("", lines[0])
    line = re.sub(r"^(\d+[.)]|[-*•])\s+", "", line)
    return line.strip(" \t*_`\"'“”‘’「」《》")


def fault_of(text: str) -> str | None:
    """What keeps a cleaned text from being a query; None if nothing does."""
    if not text:
        return "empty"
    if count_words(text) > LONGEST:
        return "too long"
    return "about the text" if _OF_THE_TEXT.search(text) else None


def found_again(
    folder: Path, items: Sequence[KnownItem], *, first: int, reader: Path | None, workdir: Workdir
) -> list[KnownItem]:
    """Those whose document is among the `first` that BM25 finds by the query, or that `reader` finds."""
    data = Dataset(folder.name, "", {}, {}, lambda: read_corpus(folder), folder)
    languages = Counter(detect_language(item.text) for item in items)
    lang = languages.most_common(1)[0][0] if languages else "en"
    index = Index.for_dataset(data, workdir.root / "index", analyzer=analyzer_for(lang))
    found: set[KnownItem] = set()
    for item in items:
        if item.document in dict(index.search_text(item.text, join=DEFAULT_JOIN, k=first)):
            found.add(item)
    missed = [item for item in items if item not in found]
    if reader and missed:
        threads = usable_cores()
        encoder = Encoder(reader, threads=threads)
        vectors = workdir.root / "vectors"
        dense = DenseIndex(encoder, sha256(reader), data, index.ids, vectors, threads=threads)
        with progress("searching again", len(missed)) as advance:
            for item in missed:
                if item.document in dict(dense.search(item.text, k=first)):
                    found.add(item)
                advance()
        encoder.close()
    return [item for item in items if item in found]


def distinct(items: Sequence[KnownItem]) -> list[KnownItem]:
    """Those that don't share NEAR_DUPLICATE of their index terms (Jaccard) with an earlier one."""
    from scipy.sparse import csr_array

    vocabulary: dict[str, int] = {}
    terms = []
    for item in items:
        analyze = get_analyzer(analyzer_for(detect_language(item.text)))
        terms.append({vocabulary.setdefault(term, len(vocabulary)) for term in analyze(item.text)})
    sizes = np.array([len(found) for found in terms], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.array([column for found in terms for column in found], np.int64)
    shape = (len(items), max(1, len(vocabulary)))
    rows = csr_array((np.ones(len(columns), np.float32), columns, starts), shape=shape)
    shared = (rows @ rows.T).tocoo()
    dropped: set[int] = set()
    for later, earlier, common in sorted(
        zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist(), strict=True)
    ):
        either = sizes[later] + sizes[earlier] - common
        if earlier < later and earlier not in dropped and common >= NEAR_DUPLICATE * either:
            dropped.add(later)
    return [item for i, item in enumerate(items) if i not in dropped]
