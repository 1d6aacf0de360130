"""How likely one answer is after each of several prompts, on llama.cpp: they are read, nothing is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.llama_batch import PREFIX_CELLS, free, put
from qe_edge.backends.llama_model import LlamaModel
from qe_edge.backends.protocol import PROMPTS, READ, groups
from qe_edge.errors import BadInput

PREFIX = 0  # the sequence of what all prompts begin with


class LlamaReader:
    """A context of its own over a loaded model, whose cache holds one group of prompts and their prefix.

    Raises:
        QeEdgeError: there is no memory for the cache.
    """

    def __init__(self, model: LlamaModel):
        self._model = model  # which stays loaded
        self._lib = lib = model.lib
        self._context, self._batch = model.context_of(PREFIX_CELLS + READ, batch=READ, sequences=1 + PROMPTS)
        release = partial(free, lib, self._batch, self._context)
        self._lifetime = Lifetime(self, release, model.lifetime)
        self._memory = lib.llama_get_memory(self._context)
        self._prefix: list[int] = []

    def log_likelihoods(
        self, prompts: Sequence[list[int]], answer: list[int], *, prefix: int
    ) -> Iterator[list[float]]:
        if prefix > PREFIX_CELLS:
            raise BadInput(f"{prefix} tokens before the passage are over {PREFIX_CELLS}")
        for group in groups(prompts, answer, prefix):
            with self._lifetime:
                self._keep(group[0][:prefix])
                values = self._read([tokens[prefix:] for tokens in group], answer)
            yield values

    def forget(self) -> None:
        self._prefix = []

    def _keep(self, prefix: list[int]) -> None:
        """Compute what all prompts begin with, unless it is there."""
        if prefix != self._prefix:
            self._lib.llama_memory_clear(self._memory, True)
            self._prefix = []
            self._decode(put(self._batch, 0, prefix, 0, PREFIX))
            self._prefix = prefix

    def _read(self, group: Sequence[list[int]], answer: list[int]) -> list[float]:
        lib, size, rows = self._lib, 0, []
        for number, tokens in enumerate(group, PREFIX + 1):
            lib.llama_memory_seq_rm(self._memory, number, -1, -1)  # what an interrupted call left
            lib.llama_memory_seq_cp(self._memory, PREFIX, number, -1, -1)
            size = put(self._batch, size, tokens, len(self._prefix), number)
            # Each token of the answer is foretold by the one before it.
            rows.append(range(size - len(answer) - 1, size - 1))
            for row in rows[-1]:
                self._batch.logits[row] = True
        self._decode(size)
        values = [sum(map(self._log_probability, places, answer)) for places in rows]
        for number in range(PREFIX + 1, PREFIX + 1 + len(group)):
            lib.llama_memory_seq_rm(self._memory, number, -1, -1)
        return values

    def _log_probability(self, row: int, token: int) -> float:
        pointer = self._lib.llama_get_logits_ith(self._context, row)
        logits = np.ctypeslib.as_array(pointer, (self._model.vocabulary,))
        top = logits.max()
        return float(logits[token] - top - np.log(np.exp(logits - top).sum(dtype=np.float64)))

    def _decode(self, size: int) -> None:
        self._batch.n_tokens = size
        prefix, self._prefix = self._prefix, []  # which is computed anew after a failure
        self._model.decode(self._context, self._batch)
        self._prefix = prefix

    def close(self) -> None:
        self._lifetime.close()
