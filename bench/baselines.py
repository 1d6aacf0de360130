"""What a user could take instead: an encoder over all documents, over BM25's first ones, or beside BM25.

`dense` ranks all documents by the cosine with the query, `rerank` BM25's first FIRST, `hybrid` adds up the
reciprocal ranks of BM25 and dense (Cormack et al., SIGIR 2009). The encoder is a GGUF on llama.cpp, as a
reader's is. What expansion doesn't cost is measured too: all documents are encoded once, the vectors kept.
Times are the encoder's and its search's; BM25's own, for rerank and hybrid, come on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import quantiles
from typing import Literal, NamedTuple, get_args

import numpy as np

from qe_edge.bench.prf import read_texts
from qe_edge.bench.result import Encoding, Speed
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import progress, shown
from qe_edge.errors import BadArgument, NotFound
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.trec import Ranking
from qe_edge.runtime.reader import Encoder
from qe_edge.work.files import atomic_path, read_json, sha256, write_json
from qe_edge.work.machine import usable_cores

Kind = Literal["dense", "rerank", "hybrid"]
FIRST = 50  # of BM25's, that are reranked
RANK = 60  # that is added to each rank before its reciprocal
TOGETHER = 256  # texts
_VECTORS, _META = "vectors.npy", "encoding.json"


class Baseline(NamedTuple):
    kind: Kind
    model: Path

    @property
    def name(self) -> str:
        return f"{self.kind} {shown(self.model.stem)}"


def parse_baseline(text: str) -> Baseline:
    """`KIND:FILE`.

    Raises:
        BadArgument: an unknown kind.
        NotFound: no such file.
    """
    kind, _, file = text.partition(":")
    known: dict[str, Kind] = {name: name for name in get_args(Kind)}
    if kind not in known or not file:
        raise BadArgument(f"can't read the baseline {text!r}: write dense:FILE, rerank:FILE or hybrid:FILE")
    if not Path(file).is_file():
        raise NotFound(f"{file}: no such file; an encoder is a .gguf file")
    return Baseline(known[kind], Path(file))


class EncoderSystem:
    """An encoder and, where all documents are ranked, its vectors of a collection.

    Args:
        cache: where vectors are kept, for each collection and encoder.
    """

    def __init__(self, model: Path, data: Dataset, ids: Sequence[str], cache: Path, threads: int | None):
        self._data, self._ids, self._threads = data, ids, threads or usable_cores()
        start = time.perf_counter()
        self._encoder = Encoder(model, threads=self._threads)
        self._load_s = time.perf_counter() - start
        self._model = model
        self._folder = cache / f"{data.collection_hash()[:16]}-{sha256(model)[:16]}"
        self._vectors: np.ndarray | None = None
        self.encoding: Encoding | None = None

    def unknown(self) -> int:
        """How many queries it lacks the tokens for, as an English encoder does for Chinese."""
        return sum(not self._encoder.knows(query) for query in self._data.queries.values())

    def close(self) -> None:
        self._encoder.close()

    def dense(self, texts: Mapping[str, str], depth: int) -> tuple[dict[str, Ranking], Speed]:
        """Every query's best documents; where there is a text, by the mean of its vector and the query's."""
        vectors, found, times = self._collection(), {}, []
        for query_id, query in self._data.queries.items():
            start = time.perf_counter()
            scores = vectors @ self._wanted(query, texts.get(query_id, ""))
            best = np.argpartition(-scores, min(depth, len(scores)) - 1)[:depth]
            best = best[np.lexsort((best, -scores[best]))]
            found[query_id] = [(self._ids[i], float(scores[i])) for i in best]
            times.append(time.perf_counter() - start)
        return found, self._speed(times)

    def rerank(self, run: Mapping[str, Ranking]) -> tuple[dict[str, Ranking], Speed]:
        """Each ranking with its FIRST documents by cosine; those below them stay below."""
        wanted = {doc_id for ranking in run.values() for doc_id, _ in ranking[:FIRST]}
        texts, found, times = read_texts(self._data, wanted), {}, []
        for query_id, query in self._data.queries.items():
            start = time.perf_counter()
            first = [doc_id for doc_id, _ in run[query_id][:FIRST]]
            cosines = self._encoder.vectors([texts[i] for i in first]) @ self._wanted(query, "")
            order = sorted(range(len(first)), key=lambda i: -cosines[i])
            # Cosines are 1 at most: what was not looked at follows, in its order.
            below = [(doc_id, -2.0 - rank) for rank, (doc_id, _) in enumerate(run[query_id][FIRST:])]
            found[query_id] = [(first[i], float(cosines[i])) for i in order] + below
            times.append(time.perf_counter() - start)
        return found, self._speed(times)

    def _wanted(self, query: str, text: str) -> np.ndarray:
        vector = self._encoder.vectors([query, text] if text else [query]).sum(axis=0)
        return vector / max(float(np.linalg.norm(vector)), 1e-12)

    def _speed(self, times: Sequence[float]) -> Speed:
        cuts = quantiles(times, n=20, method="inclusive") if len(times) > 1 else [times[0]] * 19
        return Speed(
            engine="llama.cpp",
            threads=self._threads,
            load_s=self._load_s,
            prefill_tokens_per_s=None,
            decode_tokens_per_s=None,
            ms_per_query_p50=1000 * cuts[9],
            ms_per_query_p95=1000 * cuts[18],
            mean_tokens=0.0,
            peak_memory_mb=peak_memory_mb(),
            file_mb=self._model.stat().st_size / 1e6,
        )

    def _collection(self) -> np.ndarray:
        """Vectors [documents, size] in the order of the ids, memory-mapped."""
        if self._vectors is None:
            if not self._folder.exists():
                with atomic_path(self._folder) as partial:
                    partial.mkdir()
                    seconds = self._encode(partial / _VECTORS)
                    write_json(partial / _META, {"seconds": seconds, "threads": self._threads})
            self._vectors = np.load(self._folder / _VECTORS, mmap_mode="r")
            meta = read_json(self._folder / _META)
            size = (self._folder / _VECTORS).stat().st_size
            self.encoding = Encoding(meta["seconds"], meta["threads"], size / 1e6)
        return self._vectors

    def _encode(self, file: Path) -> float:
        shape = (len(self._ids), self._encoder.size)
        kept = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
        documents, done, start = self._data.documents(), 0, time.perf_counter()
        with progress(f"encoding with {self._model.stem}", shape[0]) as advance:
            while group := [text for _, text in islice(documents, TOGETHER)]:
                kept[done : done + len(group)] = self._encoder.vectors(group)
                done += len(group)
                advance(len(group))
        kept.flush()
        return time.perf_counter() - start


def fused(one: Mapping[str, Ranking], other: Mapping[str, Ranking], depth: int) -> dict[str, Ranking]:
    """Both rankings of each query by the sum of their reciprocal ranks."""
    found = {}
    for query_id in one:
        scores: dict[str, float] = {}
        for ranking in (one[query_id], other[query_id]):
            for rank, (doc_id, _) in enumerate(ranking, 1):
                scores[doc_id] = scores.get(doc_id, 0.0) + 1 / (RANK + rank)
        found[query_id] = sorted(scores.items(), key=lambda item: -item[1])[:depth]
    return found
