"""A BM25 index on bm25s that searches weighted terms.

Defaults k1 = 0.9, b = 0.4 are Anserini's, so that figures meet the literature's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from qe_edge.analysis import analyzer_for, get_analyzer
from qe_edge.errors import BadInput, NotFound
from qe_edge.join import Join
from qe_edge.manifest import atomic_path

if TYPE_CHECKING:
    from qe_edge.datasets import Dataset

K1, B = 0.9, 0.4
_META = "qe_edge_index.json"
_ARRAYS = {"data": "data", "indices": "rows", "indptr": "starts"}  # bm25s's name: ours

Ranking = list[tuple[str, float]]
"""(document id, score), best first; equal scores in the collection's order."""


class IndexMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an index was made with; a change of any of it is another index."""

    analyzer: str
    k1: float
    b: float
    documents: int


class Index:
    """Search weighted terms with BM25 (Lucene's variant, Kamphuis et al. 2020)."""

    def __init__(
        self,
        scores: Mapping[str, np.ndarray],
        vocab: dict[str, int],
        ids: list[str],
        meta: IndexMeta,
        folder: Path | None = None,
    ):
        # bm25s keeps every term's score in every document as a CSC matrix; a column is a posting list,
        # in the documents' order.
        self.data, self.rows, self.starts = scores["data"], scores["indices"], scores["indptr"]
        self.vocab = vocab
        self.ids = ids
        self.meta = meta
        self.folder = folder  # where it is saved
        self.analyze = get_analyzer(meta.analyzer)

    @classmethod
    def build(
        cls, documents: Iterable[tuple[str, str]], *, analyzer: str, k1: float = K1, b: float = B
    ) -> Index:
        """Index (id, text) documents."""
        retriever, vocab, ids = _index(documents, analyzer, k1, b)
        return cls(retriever.scores, vocab, ids, IndexMeta(analyzer, k1, b, len(ids)))

    @classmethod
    def for_dataset(cls, dataset: Dataset, cache: Path, *, analyzer: str = "") -> Index:
        """The index of a data set's documents, kept under `cache`; its language decides the analyzer."""
        analyzer = analyzer or analyzer_for(dataset.lang)
        get_analyzer(analyzer)
        folder = cache / f"{Path(dataset.name).name}-{dataset.collection_hash()[:12]}-{analyzer}"
        if not folder.exists():
            cls.build(dataset.documents(), analyzer=analyzer).save(folder)
        return cls.open(folder)

    def save(self, folder: Path | str) -> None:
        """Write the index; an older one of that name is replaced once the new one is whole."""
        with atomic_path(folder) as path:
            path.mkdir()
            for name in _ARRAYS.values():
                np.save(path / f"{name}.npy", getattr(self, name))
            (path / "vocab.json").write_bytes(msgspec.json.encode(self.vocab))
            (path / "ids.json").write_bytes(msgspec.json.encode(self.ids))
            (path / _META).write_bytes(msgspec.json.encode(self.meta))

    @classmethod
    def open(cls, folder: Path | str) -> Index:
        """Open a saved index, its postings memory-mapped.

        Raises:
            NotFound: there is no index.
            BadInput: it is damaged.
        """
        folder = Path(folder)
        if not (folder / _META).is_file():
            raise NotFound(f"{folder}: no index there")
        try:
            # As plain arrays over the mapped file: slicing np.memmap itself costs far more.
            scores = {
                key: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
                for key, name in _ARRAYS.items()
            }
            return cls(
                scores,
                msgspec.json.decode((folder / "vocab.json").read_bytes(), type=dict[str, int]),
                msgspec.json.decode((folder / "ids.json").read_bytes(), type=list[str]),
                msgspec.json.decode((folder / _META).read_bytes(), type=IndexMeta),
                folder,
            )
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            raise BadInput(
                f"the index is damaged ({error}); delete it and it is built again", path=folder
            ) from None

    def search(self, weights: Mapping[str, float], k: int = 10) -> Ranking:
        """The k best documents for weighted terms; documents that match nothing are left out.

        Equal scores are ordered by the document's place in the collection.
        """
        scores = np.zeros(len(self.ids), dtype=np.float64)
        for term, weight in weights.items():
            column = self.vocab.get(term)
            if column is not None:
                start, end = self.starts[column], self.starts[column + 1]
                # A document stands in a posting list once, so this needs no np.add.at.
                scores[self.rows[start:end]] += weight * self.data[start:end].astype(np.float64)
        return [(self.ids[i], score) for i, score in _top(scores, k)]

    def frequency(self, term: str) -> int:
        """How many documents hold a term."""
        number = self.vocab.get(term)
        return 0 if number is None else int(self.starts[number + 1] - self.starts[number])

    def search_text(self, query: str, expansion: str = "", *, join: Join, k: int = 10) -> Ranking:
        """Analyse, join and search."""
        return self.search(join(self.analyze(query), self.analyze(expansion)), k)


def _index(documents: Iterable[tuple[str, str]], analyzer: str, k1: float, b: float):  # type: ignore[no-untyped-def]
    import bm25s

    analyze = get_analyzer(analyzer)
    vocab: dict[str, int] = {}
    ids: list[str] = []
    corpus: list[list[int]] = []
    for doc_id, text in documents:
        ids.append(doc_id)
        corpus.append([vocab.setdefault(term, len(vocab)) for term in analyze(text)])
    if not vocab:
        raise BadInput("the collection has no text to index")
    retriever = bm25s.BM25(k1=k1, b=b, method="lucene")
    retriever.index((corpus, vocab), show_progress=False)
    return retriever, vocab, ids


def _top(scores: np.ndarray, k: int) -> list[tuple[int, float]]:
    candidates = np.flatnonzero(scores > 0)
    if len(candidates) > k:
        kth = np.partition(scores[candidates], -k)[-k]
        candidates = candidates[scores[candidates] >= kth]
    order = candidates[np.lexsort((candidates, -scores[candidates]))][:k]
    return [(i, float(scores[i])) for i in order.tolist()]
