"""Vectors of a whole collection by an encoder, kept once made, and the search by cosine over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from qe_edge.console import progress
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.trec import Ranking
from qe_edge.work.files import atomic_path, read_json, write_json

TOGETHER = 256  # texts
_VECTORS, _META = "vectors.npy", "encoding.json"


class TextEncoder(Protocol):
    """Makes vectors of length 1, such as `qe_edge.runtime.reader.Encoder`."""

    @property
    def size(self) -> int: ...

    def vectors(self, passages: Sequence[str]) -> np.ndarray: ...

    def query_vector(self, query: str, text: str = "") -> np.ndarray: ...


class Cost(NamedTuple):
    """What the vectors took when they were made."""

    seconds: float
    threads: int
    megabytes: float


class DenseIndex:
    """The vectors of a data set's documents, of which `ids` are the ids in their order.

    They are made when they are first searched, and kept under `cache` for each collection and encoder, of
    which `digest` is the hash.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        digest: str,
        data: Dataset,
        ids: Sequence[str],
        cache: Path,
        *,
        threads: int,
    ):
        self._encoder, self._data, self._ids, self._threads = encoder, data, ids, threads
        self._folder = cache / f"{data.collection_hash()[:16]}-{digest[:16]}"
        self._vectors: np.ndarray | None = None

    def search(self, query: str, text: str = "", *, k: int = 10) -> Ranking:
        """The k best documents; with a text, by the mean of its vector and the query's."""
        vectors = self.vectors()
        scores = vectors @ self._encoder.query_vector(query, text)
        best = np.argpartition(-scores, min(k, len(scores)) - 1)[:k]
        best = best[np.lexsort((best, -scores[best]))]
        return [(self._ids[i], float(scores[i])) for i in best]

    def vectors(self) -> np.ndarray:
        """Vectors [documents, size] in float32, memory-mapped."""
        if self._vectors is None:
            if not self._folder.exists():
                with atomic_path(self._folder) as partial:
                    partial.mkdir()
                    seconds = self._encode(partial / _VECTORS)
                    write_json(partial / _META, {"seconds": seconds, "threads": self._threads})
            self._vectors = np.load(self._folder / _VECTORS, mmap_mode="r")
        return self._vectors

    def cost(self) -> Cost:
        """Of vectors that are there."""
        meta = read_json(self._folder / _META)
        return Cost(meta["seconds"], meta["threads"], (self._folder / _VECTORS).stat().st_size / 1e6)

    def _encode(self, file: Path) -> float:
        shape = (len(self._ids), self._encoder.size)
        kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        documents, done, start = self._data.documents(), 0, time.perf_counter()
        with progress("encoding", shape[0]) as advance:
            while group := [text for _, text in islice(documents, TOGETHER)]:
                kept[done : done + len(group)] = self._encoder.vectors(group)
                done += len(group)
                advance(len(group))
        kept.flush()
        return time.perf_counter() - start
