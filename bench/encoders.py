"""Models that rank without a student: bi- and cross-encoders, on llama.cpp or sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from qe_edge.console import quiet_transformers
from qe_edge.errors import BadArgument, NotFound, QeEdgeError, require
from qe_edge.runtime.reader import Encoder


class Ranker(Protocol):
    """Scores texts for a query; `size` is a vector's, 0 of a model that makes none."""

    engine: str
    size: int
    megabytes: float

    def vectors(self, passages: Sequence[str]) -> np.ndarray:
        """Vectors [passages, size] of length 1."""
        ...

    def query_vector(self, query: str, text: str = "") -> np.ndarray:
        """What these are compared with: the query's, or the mean with that of a text."""
        ...

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """How well each text answers the query: a number of any size, more being better."""
        ...

    def knows(self, query: str) -> bool:
        """Whether it has tokens for the query."""
        ...

    def close(self) -> None: ...


def open_ranker(model: str, *, threads: int) -> Ranker:
    """A GGUF on llama.cpp, anything else by sentence-transformers.

    Raises:
        NotInstalled: what it needs isn't there.
        NotFound, BadInput: there is no such model, or it is none that ranks.
    """
    if Path(model).suffix == ".gguf":
        return LlamaRanker(Path(model), threads=threads)
    library = require("sentence_transformers", "dense")
    import torch
    import transformers

    quiet_transformers()
    torch.set_num_threads(threads)
    try:
        kinds = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False).architectures or ()
        if any(kind.endswith("ForSequenceClassification") for kind in kinds):
            return CrossRanker(library.CrossEncoder(model, trust_remote_code=False))
        return SentenceRanker(library.SentenceTransformer(model, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise NotFound(f"{model} can't be loaded by sentence-transformers: {error}") from None


class LlamaRanker:
    """A bi-encoder's GGUF."""

    engine = "llama.cpp"

    def __init__(self, model: Path, *, threads: int):
        self._encoder = Encoder(model, threads=threads)
        self.size, self.megabytes = self._encoder.size, model.stat().st_size / 1e6
        self.vectors, self.query_vector = self._encoder.vectors, self._encoder.query_vector
        self.knows, self.close = self._encoder.knows, self._encoder.close

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        return self.vectors(texts) @ self.query_vector(query)


class _OfTorch:
    """What both kinds of sentence-transformers' models have in common."""

    engine = "sentence-transformers"

    def __init__(self, model: Any):
        self._model = model
        self.megabytes = sum(part.numel() * part.element_size() for part in model.parameters()) / 1e6

    def knows(self, query: str) -> bool:
        tokenizer = self._model.tokenizer
        ids = tokenizer(query, add_special_tokens=False)["input_ids"]
        return tokenizer.unk_token_id is None or ids.count(tokenizer.unk_token_id) * 4 <= len(ids)

    def close(self) -> None:
        del self._model


class SentenceRanker(_OfTorch):
    """A bi-encoder: cosines, with the prompts that its makers gave it for queries and for documents."""

    def __init__(self, model: Any):
        super().__init__(model)
        self.size = int(model.get_embedding_dimension())

    def vectors(self, passages: Sequence[str]) -> np.ndarray:
        return self._encoded(self._model.encode_document, passages)

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        return self.vectors(texts) @ self.query_vector(query)

    def query_vector(self, query: str, text: str = "") -> np.ndarray:
        (wanted,) = self._encoded(self._model.encode_query, [query])
        mixed = wanted + self.vectors([text])[0] if text else wanted
        return mixed / max(float(np.linalg.norm(mixed)), 1e-12)

    @staticmethod
    def _encoded(encode: Any, texts: Sequence[str]) -> np.ndarray:
        found = encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(found, np.float32)


class CrossRanker(_OfTorch):
    """A cross-encoder, which reads query and text together and makes no vectors."""

    size = 0

    def vectors(self, passages: Sequence[str]) -> np.ndarray:
        raise BadArgument("a cross-encoder makes no vectors: it can only rerank, with rerank:MODEL")

    def query_vector(self, query: str, text: str = "") -> np.ndarray:
        return self.vectors([query])

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        found = self._model.predict([(query, text) for text in texts], show_progress_bar=False)
        values = np.asarray(found, np.float32)
        if values.ndim != 1:
            raise QeEdgeError("this classifier gives several scores of a pair: it is no reranker")
        return values
