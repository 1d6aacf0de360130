"""A collection's texts -> terms and counts, a block at a time; large collections on all cores."""

from __future__ import annotations

import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from qe_edge.errors import QeEdgeError
from qe_edge.text import Analyzer, get_analyzer

BLOCK = 20_000  # documents
ALONE = 3  # blocks that one process analyses sooner than others have started
MOST_WORDS = 1_000_000  # whose terms are kept: some 100 MB


class Block(NamedTuple):
    """`terms` in the order in which they first occur, which decides the vocabulary's; int32 throughout."""

    ids: list[str]
    terms: list[str]
    postings: np.ndarray  # [postings, 2]: a term's place in `terms`, and how often the document holds it
    lengths: np.ndarray  # [documents]: terms, each as often as it occurs
    sizes: np.ndarray  # [documents]: terms, each once


def analysed(documents: Iterable[tuple[str, str]], analyzer: Analyzer, *, workers: int) -> Iterator[Block]:
    """The blocks of a collection, in its order, which no number of workers changes.

    Raises:
        QeEdgeError: a worker process died.
    """
    blocks = _blocks(documents)
    here = BlockAnalyzer(analyzer)
    first = list(islice(blocks, ALONE)) if workers > 1 else []
    more = next(blocks, None) if workers > 1 else None
    for block in first if workers > 1 else blocks:
        yield here(block)
    if more is not None:
        yield from _in_processes(chain([more], blocks), analyzer.name, workers)


def _blocks(documents: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    rest = iter(documents)
    while block := list(islice(rest, BLOCK)):
        yield block


class BlockAnalyzer:
    """Analyses blocks. What a word's term is, is kept: most words of a text are known from others."""

    def __init__(self, analyzer: Analyzer):
        self._words, self._terms = analyzer.words, analyzer.terms
        self._known: dict[str, str] = {}  # an empty one is a stop word's

    def __call__(self, block: list[tuple[str, str]]) -> Block:
        places: dict[str, int] = {}
        terms: list[int] = []
        counts: list[int] = []
        lengths, sizes = [], []
        for _, text in block:
            found = self._count(self._words(text))
            terms.extend([places.setdefault(term, len(places)) for term in found])
            counts.extend(found.values())
            lengths.append(sum(found.values()))
            sizes.append(len(found))
        ids = [document_id for document_id, _ in block]
        postings = np.array([terms, counts], np.int32).T
        return Block(ids, list(places), postings, np.array(lengths, np.int32), np.array(sizes, np.int32))

    def _count(self, words: list[str]) -> dict[str, int]:
        """Terms and how often each occurs, in the order of their first words."""
        counted = Counter(words)
        if self._terms is None:
            return counted
        known = self._known
        found: dict[str, int] = {}
        for word, count in counted.items():
            term = known.get(word)
            if term is None:
                if len(known) >= MOST_WORDS:
                    known.clear()
                term = known[word] = next(iter(self._terms([word])), "")
            if term:
                found[term] = found.get(term, 0) + count
        return found


def _in_processes(blocks: Iterator[list[tuple[str, str]]], analyzer: str, workers: int) -> Iterator[Block]:
    # A forked copy of a process with threads may hang; a fresh one does not.
    with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(analyzer,)) as pool:
        waiting: deque[Future[Block]] = deque()
        try:
            for block in blocks:
                waiting.append(pool.submit(_analyse, block))
                if len(waiting) > 2 * workers:  # so that memory holds a few blocks, and all have work
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise QeEdgeError(
                "a process that read documents died. It may have run out of memory, or a script calls this "
                'outside of `if __name__ == "__main__":`'
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


_here: Callable[[list[tuple[str, str]]], Block]


def _start(analyzer: str) -> None:
    global _here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then ends us
    _here = BlockAnalyzer(get_analyzer(analyzer))


def _analyse(block: list[tuple[str, str]]) -> Block:
    return _here(block)
