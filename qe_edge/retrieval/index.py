"""A BM25 index on bm25s that searches weighted terms.

Defaults k1 = 0.9, b = 0.4 are Anserini's, so that figures meet the literature's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Protocol

import msgspec
import numpy as np

from qe_edge.arguments import check_kind, check_number, check_whole
from qe_edge.console import counting, progress
from qe_edge.errors import BadInput, NotFound
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.postings import DATA, ROWS, STARTS, Strings, write_postings
from qe_edge.retrieval.trec import Ranking
from qe_edge.student.join import Join
from qe_edge.text import analyzer_for, get_analyzer
from qe_edge.work.files import atomic_path
from qe_edge.work.machine import usable_cores

K1, B = 0.9, 0.4
# Of an index's files and terms; one of another format is built anew, beside it. 4: Chinese in between is cut.
FORMAT = 4
_META, _IDS, _VOCAB = "qe_edge_index.json", "ids.bin", "vocab.json"


class Retriever(Protocol):
    """What a benchmark searches: our own index, or a cluster's."""

    def search_text(self, query: str, expansion: str = "", *, join: Join, k: int = 10) -> Ranking:
        """The k best documents for a query and its expansion."""
        ...


class IndexMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an index was made with; a change of any of it is another index."""

    analyzer: str
    k1: float
    b: float
    documents: int
    format: int = FORMAT


class _Format(msgspec.Struct):
    format: int = 2  # which did not say so


class Index:
    """Search weighted terms with BM25 (Lucene's variant, Kamphuis et al. 2020).

    Every term's score in every document is kept as a CSC matrix, as bm25s does: a column is a posting list,
    in the documents' order.
    """

    def __init__(self, folder: Path, *, mapped: bool = True):
        self.folder = folder if mapped else None  # where it stays
        mode: Literal["r"] | None = "r" if mapped else None
        # As plain arrays over the mapped file: slicing np.memmap itself costs far more.
        self.data, self.rows, self.starts = (
            np.asarray(np.load(folder / name, mmap_mode=mode)) for name in (DATA, ROWS, STARTS)
        )
        self.vocab = msgspec.json.decode((folder / _VOCAB).read_bytes(), type=dict[str, int])
        self.ids: Sequence[str] = Strings.open(folder / _IDS, mapped=mapped)
        self.meta = msgspec.json.decode((folder / _META).read_bytes(), type=IndexMeta)
        self.analyze = get_analyzer(self.meta.analyzer)

    @classmethod
    def build(
        cls, documents: Iterable[tuple[str, str]], *, analyzer: str, k1: float = K1, b: float = B
    ) -> Index:
        """Index (id, text) documents, in memory."""
        with TemporaryDirectory() as folder:
            cls.write(map(_document, documents), Path(folder), analyzer=analyzer, k1=k1, b=b)
            return cls(Path(folder), mapped=False)

    @staticmethod
    def write(
        documents: Iterable[tuple[str, str]],
        folder: Path,
        *,
        analyzer: str,
        k1: float = K1,
        b: float = B,
        workers: int = 1,
    ) -> None:
        """Index (id, text) documents into an existing folder, in a stream.

        Several `workers`, which are processes, analyse a collection of more than 60,000 documents.

        Raises:
            BadInput: no document has a term, or an id is there twice or holds blanks.
        """
        vocab, ids = write_postings(documents, get_analyzer(analyzer), folder, k1=k1, b=b, workers=workers)
        save_names(folder, vocab, ids, IndexMeta(analyzer, k1, b, len(ids)))

    @classmethod
    def for_dataset(cls, dataset: Dataset, cache: Path, *, analyzer: str = "") -> Index:
        """The index of a data set's documents, kept under `cache`; its language decides the analyzer."""
        analyzer = analyzer or analyzer_for(dataset.lang)
        get_analyzer(analyzer)
        folder = cache / f"{dataset.collection_hash()[:16]}-{analyzer}-v{FORMAT}"
        if not folder.exists():
            with atomic_path(folder) as partial, progress(f"indexing {dataset.name}", None) as advance:
                partial.mkdir()
                documents = counting(dataset.documents(), advance)
                cls.write(documents, partial, analyzer=analyzer, workers=usable_cores())
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path | str) -> Index:
        """Open a saved index, its postings and ids memory-mapped.

        Raises:
            NotFound: there is no index.
            BadInput: it is damaged, or of another format.
        """
        folder = Path(folder)
        if not (folder / _META).is_file():
            raise NotFound(f"{folder}: no index there")
        try:
            made = msgspec.json.decode((folder / _META).read_bytes(), type=_Format).format
            if made != FORMAT:
                raise BadInput(
                    f"an index of format {made}, and this qe-edge reads {FORMAT}; build it again", path=folder
                )
            return cls(folder)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise BadInput(
                f"the index is damaged ({error}); delete it and it is built again", path=folder
            ) from None

    def search(self, weights: Mapping[str, float], k: int = 10) -> Ranking:
        """The k best documents for weighted terms; documents that match nothing are left out.

        Equal scores are ordered by the document's place in the collection.
        """
        return [(self.ids[place], score) for place, score in self.rank(weights, k)]

    def rank(self, weights: Mapping[str, float], k: int = 10) -> list[tuple[int, float]]:
        """As `search`, with documents' places in the collection instead of their ids."""
        from scipy.sparse import csc_array

        check_whole("k", k, 1, 2**31)
        check_kind("weights", weights, Mapping, "a dict of terms and weights, such as ExpandedQuery.terms()")
        for term, weight in weights.items():
            check_number(f"the weight of {term!r}", weight, -sys.float_info.max, sys.float_info.max)
        known = [(self.vocab[term], weight) for term, weight in weights.items() if term in self.vocab]
        parts = [slice(self.starts[column], self.starts[column + 1]) for column, _ in known]
        ends = np.cumsum([0, *(part.stop - part.start for part in parts)])
        # The terms' postings side by side, multiplied by their weights in scipy's compiled loop.
        rows, data = np.empty(ends[-1], np.int32), np.empty(ends[-1])
        for part, start, end in zip(parts, ends, ends[1:], strict=False):
            rows[start:end], data[start:end] = self.rows[part], self.data[part]
        matrix = csc_array((data, rows, ends), shape=(len(self.ids), len(known)))
        return _top(matrix @ np.array([weight for _, weight in known]), k)

    def frequency(self, term: str) -> int:
        """How many documents hold a term."""
        number = self.vocab.get(term)
        return 0 if number is None else int(self.starts[number + 1] - self.starts[number])

    def search_text(self, query: str, expansion: str = "", *, join: Join, k: int = 10) -> Ranking:
        """Analyse, join and search."""
        check_kind("join", join, Join, 'a Join, such as Join.parse("mass:0.7")')
        return self.search(join(self.analyze(query), self.analyze(expansion)), k)


def _document(document: tuple[str, str]) -> tuple[str, str]:
    """As it is, if it is (id, text)."""
    wanted = "an (id, text) pair of two str"
    check_kind("a document", document, (tuple, list), wanted)
    if len(document) != 2 or not all(isinstance(part, str) for part in document):
        raise TypeError(f"a document must be {wanted}, not {document!r:.80}")
    return document


def save_names(folder: Path, vocab: dict[str, int], ids: Sequence[str], meta: IndexMeta) -> None:
    """Write what an index holds beside the postings."""
    (folder / _VOCAB).write_bytes(msgspec.json.encode(vocab))
    Strings.save(ids, folder / _IDS)
    (folder / _META).write_bytes(msgspec.json.encode(meta))


def _top(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    """The k best (place, score) above 0, equal scores in the order of their places."""
    # The k-th best of the best of many blocks is at most the k-th best of all: what is below it is out, and
    # only the rest, a few thousand of millions, need be sorted.
    bests = np.maximum.reduceat(scores, np.arange(0, len(scores), max(1, len(scores) // (8 * k))))
    least = np.partition(bests, -k)[-k] if k < len(bests) else 0.0
    candidates = np.flatnonzero(scores >= max(least, np.nextafter(0, 1)))
    found = scores[candidates]
    order = np.lexsort((candidates, -found))[:k]
    return list(zip(candidates[order].tolist(), found[order].tolist(), strict=True))
