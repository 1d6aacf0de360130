"""Many token sequences in one llama.cpp context, each decoded a token at a time in one common batch.

A weight that is read from memory serves every sequence of the batch, and reading weights is what decoding
spends its time on. The prefix that prompts share is computed once and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.llama_model import LlamaModel

Pick = Callable[[np.ndarray], int]
"""Logits [vocabulary] -> the next token."""

BATCH = 512  # tokens that one call of llama.cpp gets
KEPT = 2  # prefixes: a student's prompt in each of its languages
# Cache for a sequence alone, a page and its expansion, and for the prefixes.
CONTEXT, PREFIX_CELLS = 2048, 256
# Cache for each of several: a query of a few lines and its expansion.
STREAM = 256


@dataclass
class _Running:
    """A sequence on its way: its place in the cache, tokens that llama.cpp hasn't seen, how many it has."""

    place: int
    pending: list[int]
    seen: int
    pick: Pick


class LlamaBatch:
    """Up to `slots` sequences over a loaded model.

    Several have a cache each (a stream, in llama.cpp's words), so that none attends over the others' cells. A
    sequence alone shares one cache, of the whole context, with the prefixes.

    Raises:
        QeEdgeError: there is no memory for the cache.
    """

    def __init__(self, model: LlamaModel, slots: int):
        self._model = model  # which stays loaded
        self._lib = lib = model.lib
        self.vocabulary = model.vocabulary
        self._slots, self._alone = slots, slots == 1
        self.longest = model.context if self._alone else min(STREAM, model.context)
        cells = model.context + PREFIX_CELLS if self._alone else (slots + KEPT) * STREAM
        self.context, self._batch = model.context_of(
            cells, batch=BATCH, sequences=slots + KEPT, unified=self._alone
        )
        release = partial(free, lib, self._batch, self.context)
        self._lifetime = Lifetime(self, release, model.lifetime)
        self._memory = lib.llama_get_memory(self.context)
        self._numbers = 0  # of all that ever ran
        self._running: dict[int, _Running] = {}
        self._prefixes: dict[tuple[int, ...], int] = {}  # the one used last at the end

    def fits(self, tokens: int) -> bool:
        return len(self._running) < self._slots and tokens <= self.longest

    def add(
        self, prompt: Sequence[int], *, prefix: int, answer: int, temperature: float = 0.0, seed: int = 0
    ) -> int:
        with self._lifetime:
            return self._add(prompt, prefix, answer, picker(temperature, seed))

    def _add(self, prompt: Sequence[int], prefix: int, answer: int, pick: Pick) -> int:
        used = {sequence.place for sequence in self._running.values()}
        place = next(i for i in range(KEPT, KEPT + self._slots) if i not in used)
        self._drop(place)  # also what an interrupted call left there
        start = 0
        shared = tuple(prompt[: min(prefix, len(prompt) - 1)])
        if self._make_room(shared, len(prompt) + answer):
            self._lib.llama_memory_seq_cp(self._memory, self._keep(shared), place, -1, -1)
            start = len(shared)
        self._numbers += 1
        self._running[self._numbers] = _Running(place, list(prompt[start:]), start, pick)
        return self._numbers

    def step(self, piece: int | None = None) -> dict[int, int]:
        with self._lifetime:
            return self._step(piece or BATCH)

    def _step(self, piece: int) -> dict[int, int]:
        self._close_gaps()
        # One token of each answer first; newcomers' prompts get what is left of the batch, or of the piece.
        room, taken = BATCH, {}
        for number, sequence in sorted(self._running.items(), key=lambda item: len(item[1].pending)):
            writing = len(sequence.pending) == 1
            taken[number] = sequence.pending[: room if writing else min(room, piece)]
            room -= len(taken[number])
            piece -= 0 if writing else len(taken[number])
        size, asked = 0, {}
        for number, sequence in sorted(self._running.items(), key=lambda item: item[1].place):
            tokens = taken[number]
            if not tokens:
                continue
            del sequence.pending[: len(tokens)]
            size = put(self._batch, size, tokens, sequence.seen, sequence.place)
            sequence.seen += len(tokens)
            if not sequence.pending:
                self._batch.logits[size - 1] = True
                asked[number] = size - 1
        self._decode(size)
        found = {}
        for number, row in asked.items():
            sequence = self._running[number]
            found[number] = sequence.pick(self._logits(row))
            sequence.pending.append(found[number])  # read by the next step, unless it is removed
        return found

    def remove(self, number: int) -> None:
        with self._lifetime:
            self._drop(self._running.pop(number).place)

    def _close_gaps(self) -> None:
        """Move the last sequences to where others ended: llama.cpp computes only neighbours together."""
        by_place = {sequence.place: sequence for sequence in self._running.values()}
        places = range(KEPT, KEPT + len(by_place))
        for free in [place for place in places if place not in by_place]:
            last = max(by_place)
            self._lib.llama_memory_seq_cp(self._memory, last, free, -1, -1)
            self._drop(last)
            by_place[free] = by_place.pop(last)
            by_place[free].place = free

    def forget(self) -> None:
        with self._lifetime:
            while self._prefixes:
                self._drop(self._prefixes.popitem()[1])

    def clear(self) -> None:
        self._running.clear()
        self._prefixes.clear()
        with self._lifetime:
            self._lib.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        self._lifetime.close()

    def _make_room(self, prefix: tuple[int, ...], tokens: int) -> bool:
        """Whether a prefix can be kept beside a sequence of so many tokens; others are dropped for it."""
        # As if the sequence didn't share its cells: the prefix may be dropped before it ends.
        room = self.longest + PREFIX_CELLS - tokens if self._alone else KEPT * STREAM
        kept = prefix if 0 < len(prefix) <= min(room, self.longest) else ()
        others = [other for other in self._prefixes if other != kept]  # the one not used for longest first
        while others and (sum(map(len, others)) + len(kept) > room or (kept and len(others) == KEPT)):
            self._drop(self._prefixes.pop(others.pop(0)))
        return bool(kept)

    def _keep(self, prefix: tuple[int, ...]) -> int:
        """The sequence that holds a prefix, computed now if it isn't there."""
        if prefix in self._prefixes:
            number = self._prefixes.pop(prefix)
        else:
            number = next(i for i in range(KEPT) if i not in self._prefixes.values())
            self._drop(number)
            for at in range(0, len(prefix), BATCH):
                part = prefix[at : at + BATCH]
                self._decode(put(self._batch, 0, part, at, number))
        self._prefixes[prefix] = number
        return number

    def _drop(self, number: int) -> None:
        self._lib.llama_memory_seq_rm(self._memory, number, -1, -1)

    def _decode(self, size: int) -> None:
        self._batch.n_tokens = size
        self._model.decode(self.context, self._batch)

    def _logits(self, place: int) -> np.ndarray:
        """Logits [vocabulary] after a token of the last batch, in llama.cpp's own memory."""
        row = self._lib.llama_get_logits_ith(self.context, place)
        return np.ctypeslib.as_array(row, (self.vocabulary,))


def put(batch: Any, at: int, tokens: Sequence[int], position: int, number: int) -> int:
    """Write a sequence's next tokens into a batch of llama.cpp, from place `at`; returns the place after."""
    for i, token in enumerate(tokens):
        place = at + i
        batch.token[place], batch.pos[place] = token, position + i
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, number
        batch.logits[place] = False
    return at + len(tokens)


def picker(temperature: float, seed: int) -> Pick:
    """Greedy, or a draw from the full distribution."""
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    draw = np.random.default_rng(seed % 2**32)
    # The likeliest of the logits with Gumbel noise is a draw from their softmax.
    return lambda logits: int((logits / temperature + draw.gumbel(size=logits.shape)).argmax())


def free(lib: Any, batch: Any, context: Any) -> None:
    lib.llama_batch_free(batch)
    lib.llama_free(context)
