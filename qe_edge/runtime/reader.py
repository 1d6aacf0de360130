"""Who weighs passages: the student, by how likely the query is after each, or an encoder, by likeness."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from inspect import isawaitable
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from qe_edge.arguments import MOST_THREADS, check_number, check_path, check_text, check_texts, check_whole
from qe_edge.backends.protocol import Backend
from qe_edge.errors import BadArgument, NotFound
from qe_edge.runtime.decoder import Decoder
from qe_edge.runtime.generation import Reading
from qe_edge.student.feedback import MOST_PASSAGES, MOST_TOKENS, Feedback
from qe_edge.student.hub import local_file
from qe_edge.student.prompt import clean_query

# Of a query's tokens, for an encoder to read it: all-MiniLM lacks 25 to 100 % of a Chinese query's, none
# of an English one's.
MOST_UNKNOWN = 0.2
Values = Iterator[list[float]]
"""What passages are worth, a few at a time: the larger, the more they say of the query."""


class Passage(NamedTuple):
    """A passage and, where the app keeps one by the same encoder, its vector, of any length but 0."""

    text: str
    vector: Sequence[float] | np.ndarray | None = None


class PassageReader(Protocol):
    """How many passages count, how much of each, and what they are worth."""

    settings: Feedback

    def knows(self, query: str) -> bool:
        """Whether it can read such a query at all."""
        ...

    def read(self, query: str, text: str, passages: Sequence[Passage]) -> Reading:
        """Work for the decoder: passages for a query, for which `text` may have been written."""
        ...


def check_passages(most: int) -> None:
    """Refuse a number of passages that can't be read."""
    check_whole("passages", most, 1, MOST_PASSAGES)


def known(passages: Iterable[str | Passage]) -> list[Passage]:
    """Passages as they are given, looked at.

    Raises:
        TypeError: one is no text, or they are nothing that passages can be taken from.
    """
    if not isinstance(passages, Iterable):
        hint = "; `arefine` is for a search that is awaited" if isawaitable(passages) else ""
        raise TypeError(f"passages must be texts, such as a list, not {type(passages).__name__}{hint}")
    check_texts("passages", passages)
    found = [p if isinstance(p, Passage) else Passage(p) for p in passages]
    for passage in found:
        check_text("a passage, such as a search returns,", passage.text)
    return found


class StudentReader:
    """The student reads a passage and finds the query likely, or not; see `qe_edge.student.feedback`."""

    def __init__(self, backend: Backend, decoder: Decoder, most: int):
        self._backend, self._decoder = backend, decoder
        self.settings = msgspec.structs.replace(backend.spec.feedback, passages=most)

    def knows(self, query: str) -> bool:
        return True  # the gate asks for the student's languages

    def read(self, query: str, text: str, passages: Sequence[Passage]) -> Reading:
        if any(passage.vector is not None for passage in passages):
            raise BadArgument("a vector is for an encoder; name it as the expander's reader")
        prompts, answer, prefix = self.settings.encode(
            query, [passage.text for passage in passages], self._backend.spec.prompt, self._backend.tokenize
        )

        def values() -> Values:
            for found in self._decoder.reader().log_likelihoods(prompts, answer, prefix=prefix):
                yield [value / len(answer) for value in found]

        own = [len(prompt) - prefix + len(answer) for prompt in prompts]
        return Reading(values, own, prefix)


class Encoder:
    """An encoder's GGUF on llama.cpp, such as all-MiniLM-L6-v2: 25 MB that read a passage in milliseconds.

    A passage is worth the cosine of its vector with that of the query, or of query and written text together
    (their mean, as in HyDE, arXiv 2212.10496). Expanders may share one.

    Args:
        model: a GGUF, here or on the hub (`hf:owner/name:Q8_0`).
        threads: how many compute, 1 to 512; by default all cores that other processes leave free.
        temperature: cosines are divided by it before they become weights.
        tokens: how many of a passage count.
        query_prefix, passage_prefix: what the encoder wants before a text, such as "query: " for E5.

    Raises:
        NotFound, BadInput: there is no such file, or it is no encoder.
        BadArgument: a number is out of its bounds.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        threads: int | None = None,
        temperature: float = 0.05,
        tokens: int = MOST_TOKENS,
        query_prefix: str = "",
        passage_prefix: str = "",
    ):
        check_path("an encoder", model)
        check_text("query_prefix", query_prefix)
        check_text("passage_prefix", passage_prefix)
        path = local_file(model)
        if threads is not None:
            check_whole("threads", threads, 1, MOST_THREADS)
        check_number("temperature", temperature, 1e-6, 1e6)
        check_whole("tokens", tokens, 1, MOST_TOKENS)
        if not path.is_file():
            what = "a folder" if path.is_dir() else "no such file"
            raise NotFound(f"{path}: {what}; an encoder is a .gguf file, here or on the hub (hf:…)")
        from qe_edge.backends.llama_encoder import LlamaEncoder

        self.path, self.temperature, self.tokens = path, temperature, tokens
        self._query_prefix, self._passage_prefix = query_prefix, passage_prefix
        self._model = LlamaEncoder(path, threads=threads)

    @property
    def size(self) -> int:
        """How many numbers a vector has."""
        return self._model.size

    def vectors(self, passages: Sequence[str]) -> np.ndarray:
        """Vectors [passages, size] of length 1, for an app to keep with its passages."""
        check_texts("passages", passages)
        for passage in passages:
            check_text("a passage", passage)
        groups = list(self._encode(passages))
        return np.concatenate(groups) if groups else np.zeros((0, self.size), np.float32)

    def query_vector(self, query: str, text: str = "") -> np.ndarray:
        """What a passage's vector is compared with: that of the query, or the mean with that of a text."""
        check_text("a query", query)
        check_text("a text", text)
        wanted = self._one(self._query_prefix + query)
        return _unit(wanted + self._one(self._passage_prefix + text)) if text else wanted

    def cosines(self, query: str, text: str, passages: Sequence[Passage]) -> Values:
        """What each passage is worth."""
        wanted = self.query_vector(query, text)
        unread = [passage.text for passage in passages if passage.vector is None]
        groups = self._encode(unread)
        ready: list[np.ndarray] = []
        for passage in passages:
            if passage.vector is not None:
                yield [float(wanted @ self._given(passage.vector))]
                continue
            ready = ready or list(next(groups))
            yield [float(wanted @ ready.pop(0))]

    def knows(self, query: str) -> bool:
        """Whether it has tokens for the query: an English encoder, for example, has none for Chinese."""
        return self._model.unknown(query) <= MOST_UNKNOWN

    def close(self) -> None:
        """Give the memory back."""
        self._model.close()

    def _encode(self, passages: Sequence[str]) -> Iterator[np.ndarray]:
        return self._model.encode([self._passage_prefix + text for text in passages], tokens=self.tokens)

    def _one(self, text: str) -> np.ndarray:
        return next(self._model.encode([text]))[0]

    def _given(self, vector: Sequence[float] | np.ndarray) -> np.ndarray:
        try:
            found = np.asarray(vector, np.float32)
        except (TypeError, ValueError):  # no numbers, or of several lengths
            found = np.zeros(0, np.float32)
        if found.shape != (self.size,) or not np.isfinite(found).all():
            raise BadArgument(f"a passage's vector must be {self.size} finite numbers, as its encoder gives")
        return _unit(found)


class EncoderReader:
    """An encoder that reads for a student."""

    def __init__(self, encoder: Encoder, settings: Feedback, most: int):
        self._encoder = encoder
        self.settings = msgspec.structs.replace(
            settings, passages=most, temperature=encoder.temperature, tokens=encoder.tokens
        )

    def knows(self, query: str) -> bool:
        return self._encoder.knows(query)

    def read(self, query: str, text: str, passages: Sequence[Passage]) -> Reading:
        return Reading(lambda: self._encoder.cosines(clean_query(query), text, passages), [0] * len(passages))


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)
