"""A collection -> its postings, in a stream: memory grows with vocabulary and ids, not with the text.

The first pass writes each document's terms and counts to a file; the second sorts them by term, a chunk at a
time, into the arrays that a search reads. Scores are bm25s's own (Lù, arXiv 2407.03618): as there, every
term's score in every document is computed beforehand.
"""

from __future__ import annotations

import math
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np

from qe_edge.errors import BadInput
from qe_edge.retrieval.analysis import Block, analysed
from qe_edge.retrieval.judged import check_ids
from qe_edge.text import Analyzer

DATA, ROWS, STARTS = "data.npy", "rows.npy", "starts.npy"
CHUNK = 1 << 23  # postings that are sorted at a time: some 700 MB


class Strings(Sequence[str]):
    """Many short texts in one mapped file: nothing is read before it is asked for."""

    def __init__(self, blob: bytes | mmap.mmap, ends: np.ndarray):
        self.blob, self.ends = blob, ends

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[n] for n in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].decode()

    @classmethod
    def save(cls, texts: Iterable[str], file: Path) -> None:
        """Write `file` and, beside it, where each text ends; one text in memory at a time."""
        ends = array("q")
        with file.open("wb") as opened:
            for text in texts:
                opened.write(text.encode())
                ends.append(opened.tell())
        np.save(file.with_suffix(".npy"), np.frombuffer(ends, np.int64))

    @classmethod
    def open(cls, file: Path, *, mapped: bool = True) -> Strings:
        """Raises ValueError where the file is too short or too long."""
        ends = np.asarray(np.load(file.with_suffix(".npy"), mmap_mode="r" if mapped else None))
        blob: bytes | mmap.mmap
        if mapped and file.stat().st_size:
            with file.open("rb") as opened:
                blob = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            blob = file.read_bytes()
        if len(ends) and ends[-1] != len(blob):
            raise ValueError(f"{file.name} has {len(blob)} bytes, {ends[-1]} expected")
        return cls(blob, ends)


class Collected(NamedTuple):
    """The first pass: what is known of the collection, and the files with its terms and counts."""

    vocab: dict[str, int]
    ids: list[str]
    frequencies: np.ndarray  # [vocabulary]: documents that hold the term
    lengths: np.ndarray  # [documents]: terms, each as often as it occurs
    sizes: np.ndarray  # [documents]: terms, each once


def write_postings(
    documents: Iterable[tuple[str, str]],
    analyzer: Analyzer,
    folder: Path,
    *,
    k1: float,
    b: float,
    workers: int = 1,
) -> tuple[dict[str, int], list[str]]:
    """Write data.npy (scores), rows.npy (documents) and starts.npy (of each term, in both) to `folder`.

    Several `workers` analyse a large collection, which changes no byte of what is written.

    Returns:
        The vocabulary (term -> its place in starts) and the documents' ids.

    Raises:
        BadInput: no document has a term, or an id is there twice or holds blanks.
    """
    from scipy.sparse import csr_array

    spool = folder / "spool"
    with spool.open("wb") as file:
        found = _collect(analysed(documents, analyzer, workers=workers), file)
    if not found.vocab:
        raise BadInput("the collection has no text to index")
    check_ids(found.ids, None)
    starts = np.concatenate([[0], np.cumsum(found.frequencies)]).astype(np.int64)
    np.save(folder / STARTS, starts)
    data = _reserve(folder / DATA, np.float32, int(starts[-1]))
    rows = _reserve(folder / ROWS, np.int32, int(starts[-1]))
    idf = _idf(found.frequencies, len(found.ids))
    cursors = starts[:-1].copy()
    mean = found.lengths.mean()
    for first, sizes, terms, counts in _chunks(spool, found.sizes):
        lengths = np.repeat(found.lengths[first : first + len(sizes)], sizes)
        scores = idf[terms] * _tfc(counts, lengths, mean, k1, b)
        by_document = csr_array(
            (scores, terms, np.concatenate([[0], np.cumsum(sizes)])), shape=(len(sizes), len(idf))
        )
        by_term = by_document.tocsc()  # counts, and sorts nothing; of one term, documents stay in order
        runs = np.diff(by_term.indptr)
        there = np.flatnonzero(runs)
        shifts = cursors[there] - by_term.indptr[there]
        places = np.repeat(shifts, runs[there]) + np.arange(len(terms))
        data[places] = by_term.data
        rows[places] = by_term.indices + first
        cursors += runs
    spool.unlink()
    return found.vocab, found.ids


def _reserve(file: Path, dtype: type, size: int) -> np.ndarray:
    """A mapped array whose room on the disk is taken: a page that finds none would end the process."""
    array = np.lib.format.open_memmap(file, "w+", dtype, (size,))
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)
    return array


def _collect(blocks: Iterable[Block], spool: BinaryIO) -> Collected:
    vocab: dict[str, int] = {}
    ids: list[str] = []
    frequencies = np.zeros(0, np.int64)
    lengths, sizes = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for block in blocks:
        ids += block.ids
        lengths.append(block.lengths)
        sizes.append(block.sizes)
        places = np.array([vocab.setdefault(term, len(vocab)) for term in block.terms], np.int32)
        postings = block.postings.copy()
        postings[:, 0] = places[postings[:, 0]]
        spool.write(postings.tobytes())
        frequencies = np.pad(frequencies, (0, len(vocab) - len(frequencies)))
        frequencies += np.bincount(postings[:, 0], minlength=len(vocab))
    return Collected(vocab, ids, frequencies, np.concatenate(lengths), np.concatenate(sizes))


def _chunks(spool: Path, sizes: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """As many whole documents at a time as CHUNK allows.

    Yields the first one's place, their sizes, and the term and the count of each posting.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    first = done = 0
    with spool.open("rb") as file:
        while first < len(sizes):
            last = max(first + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
            size = int(ends[last - 1]) - done
            pairs = np.fromfile(file, np.int32, 2 * size).reshape(-1, 2)
            if size:
                yield first, sizes[first:last], pairs[:, 0].copy(), pairs[:, 1]
            first, done = last, int(ends[last - 1])


def _idf(frequencies: np.ndarray, documents: int) -> np.ndarray:
    """Lucene's inverse document frequency (Kamphuis et al., ECIR 2020), exact until it is rounded."""
    distinct, inverse = np.unique(frequencies, return_inverse=True)
    exact = [math.log(1 + (documents - df + 0.5) / (df + 0.5)) for df in distinct.tolist()]
    return np.array(exact, np.float32)[inverse]


def _tfc(counts: np.ndarray, lengths: np.ndarray, mean: float, k1: float, b: float) -> np.ndarray:
    """Lucene's share of a term's frequency in a score, saturated by the document's length."""
    counts = counts.astype(np.float32)
    return counts / (k1 * ((1 - b) + b * lengths / mean) + counts)
