"""An encoder's GGUF on llama.cpp: texts become vectors of length 1, close where the texts mean the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from qe_edge.backends.lifetime import Lifetime
from qe_edge.backends.llama_batch import free, put
from qe_edge.backends.llama_model import LlamaModel
from qe_edge.errors import BadInput

# Tokens and texts that are computed together: a deadline is looked at in between.
TOGETHER, TEXTS = 512, 16


class LlamaEncoder:
    """A model whose vector of a text is what its GGUF says: the mean of its tokens' or that of one of them.

    `longest` is how many tokens of a text count, those around it included.

    Raises:
        BadInput: it is no encoder of texts, or damaged.
        QeEdgeError: there is no memory for it.
    """

    def __init__(self, path: Path, *, threads: int | None):
        self._model = model = LlamaModel(path, threads=threads, longest=TOGETHER)
        self._lib = lib = model.lib
        self.longest = model.context
        self._context, self._batch = model.context_of(
            TOGETHER, batch=TOGETHER, sequences=TEXTS, embeddings=True
        )
        release = partial(free, lib, self._batch, self._context)
        self._lifetime = Lifetime(self, release, model.lifetime)
        if lib.llama_pooling_type(self._context) not in (
            lib.LLAMA_POOLING_TYPE_MEAN,
            lib.LLAMA_POOLING_TYPE_CLS,
            lib.LLAMA_POOLING_TYPE_LAST,
        ):
            self.close()
            raise BadInput("says nothing of how a text becomes one vector: it is no encoder", path=path)
        self.size: int = lib.llama_model_n_embd(model.pointer)
        self._unknown = int(model.metadata("tokenizer.ggml.unknown_token_id") or 0)
        plain, marked = model.tokenize("a"), model.tokenize("a", marked=True)
        at = next(i for i in range(len(marked)) if marked[i : i + len(plain)] == plain)
        self._before, self._after = marked[:at], marked[at + len(plain) :]

    def encode(self, texts: Sequence[str], *, tokens: int | None = None) -> Iterator[np.ndarray]:
        """Vectors [texts, size] in float32, a few texts after the other; of each text its first `tokens`."""
        most = min(tokens or self.longest, self.longest - len(self._before) - len(self._after))
        group: list[list[int]] = []
        for text in texts:
            with self._lifetime:
                ids = [*self._before, *self._model.tokenize(text)[:most], *self._after]
            if group and (sum(map(len, group)) + len(ids) > TOGETHER or len(group) == TEXTS):
                yield self._vectors(group)
                group = []
            group.append(ids)
        if group:
            yield self._vectors(group)

    def unknown(self, text: str) -> float:
        """The share of a text's tokens that stand for what the model has none for; 0 if it spells all."""
        ids = self._model.tokenize(text)
        return sum(token == self._unknown for token in ids) / len(ids) if ids and self._unknown else 0.0

    def _vectors(self, group: Sequence[Sequence[int]]) -> np.ndarray:
        lib, size = self._lib, 0
        with self._lifetime:
            if memory := lib.llama_get_memory(
                self._context
            ):  # that of an encoder that reads from left to right
                lib.llama_memory_clear(memory, True)
            for number, ids in enumerate(group):
                size = put(self._batch, size, ids, 0, number)
            for place in range(size):
                self._batch.logits[place] = True
            self._batch.n_tokens = size
            self._model.decode(self._context, self._batch)
            rows = [lib.llama_get_embeddings_seq(self._context, number) for number in range(len(group))]
            vectors = np.stack([np.ctypeslib.as_array(row, (self.size,)) for row in rows])
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def close(self) -> None:
        self._lifetime.close()
        self._model.lifetime.close()
