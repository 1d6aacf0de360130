"""The inner loops of bulk search, compiled by numba and kept compiled where there is a place for that."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numba import njit

# Documents are scored in blocks of so many, whose scores (256 KB) stay in a core's own cache.
BLOCK = 1 << 15
# Among so many scores is any that matters? Mostly not, and then they are passed over at once.
STRIDE = 64


def compiled(function: Callable) -> Callable:
    """Compiled; once for all where numba finds a folder to keep it in, else again in each process."""
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written to
        return njit(nogil=True)(function)


@compiled
def best_of(data, rows, starts, columns, weights, k, documents, scores):
    """The k best of all documents, best first, equal scores in the collection's order; then zeros.

    A column that occurs again adds to its weight. Every posting list is walked once, block of documents by
    block, each from where the last block ended. `scores` is scratch for a block.
    """
    count = 0  # unique columns, moved to the front
    for i in range(len(columns)):
        term = 0
        while term < count and columns[term] != columns[i]:
            term += 1
        if term == count:
            columns[count], weights[count] = columns[i], weights[i]
            count += 1
        else:
            weights[term] += weights[i]

    heap, threshold = [(0.0, 0) for _ in range(k)], 0.0
    cursors, ends = starts[columns[:count]], starts[columns[:count] + 1]
    for first in range(0, documents, BLOCK):
        size, offset = min(BLOCK, documents - first), np.uint32(first)
        scores[:size] = 0.0
        for term in range(count):
            at, stop, weight = cursors[term], ends[term], weights[term]
            if first + size < documents:
                stop = at + np.searchsorted(rows[at:stop], first + size)
                cursors[term] = stop
            for posting in range(at, stop):
                scores[rows[posting] - offset] += weight * data[posting]
        for low in range(0, size, STRIDE):
            high, better = min(low + STRIDE, size), 0
            for i in range(low, high):  # branchless, so it runs in vector registers
                better += scores[i] > threshold
            if better:
                for i in range(low, high):
                    if scores[i] > threshold:  # rows come in order: of equal scores, the earlier stays
                        heapq.heapreplace(heap, (scores[i], -(first + i)))
                        threshold = heap[0][0]
    best_rows, best_scores = np.empty(k, dtype=np.int64), np.empty(k)
    for place in range(k - 1, -1, -1):
        best_scores[place], row = heapq.heappop(heap)
        best_rows[place] = -row
    return best_rows, best_scores


@compiled
def best_of_each(data, rows, starts, columns, ends, scales, k, documents):
    """The best k for every candidate: arrays of rows and of scores, one line each.

    Candidate i's query has the columns up to ends[2i + 1], its expansion those from there to ends[2i + 2];
    scales[i] holds the weight of one column of either.
    """
    best_rows = np.empty((len(scales), k), dtype=np.int64)
    best_scores = np.empty((len(scales), k))
    scratch = np.empty(BLOCK)
    for i in range(len(scales)):
        first, middle, last = ends[2 * i], ends[2 * i + 1], ends[2 * i + 2]
        weights = np.empty(last - first)
        weights[: middle - first] = scales[i, 0]
        weights[middle - first :] = scales[i, 1]
        found = best_of(data, rows, starts, columns[first:last], weights, k, documents, scratch)
        best_rows[i], best_scores[i] = found
    return best_rows, best_scores
