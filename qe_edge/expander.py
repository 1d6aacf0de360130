"""`Expander`: load a student once, expand many queries."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from qe_edge.analysis import analyzer_for, detect_language, get_analyzer
from qe_edge.backends import Backend, open_backend
from qe_edge.errors import BadArgument, BadInput
from qe_edge.join import Join
from qe_edge.models import Engine, resolve
from qe_edge.spec import ModelSpec


@dataclass(frozen=True)
class ExpandedQuery:
    """A query with what the student wrote for it.

    `finish_reason` is `stop` when the student ended by itself, `length` when the token budget cut it.
    Times are in seconds: prefill runs until the first token, decode from there to the end.
    """

    query: str
    text: str
    join: Join
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prefill_s: float
    decode_s: float

    def __str__(self) -> str:
        return self.text

    @property
    def tokens(self) -> int:
        """How many tokens the student wrote, its end token not counted."""
        return len(self.token_ids)

    def terms(self, analyzer: str | None = None) -> dict[str, float]:
        """Weighted index terms of query and expansion, joined by the student's own rule.

        `analyzer` is that of your index; by default the language's own.
        """
        analyze = get_analyzer(analyzer or analyzer_for(detect_language(self.query)))
        return self.join(analyze(self.query), analyze(self.text))


class Completion(NamedTuple):
    """What a model wrote after a prompt; times in seconds, as in `ExpandedQuery`."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prefill_s: float
    decode_s: float


class Expander:
    """A student ready to expand queries.

    expander = Expander.load("student-Q4_K_M.gguf")
    expander.expand("what causes tides").text
    """

    def __init__(self, backend: Backend, *, max_tokens: int | None = None):
        self.backend = backend
        self.max_tokens = backend.spec.prompt.max_tokens if max_tokens is None else max_tokens
        self._end = set(backend.tokenize(self.spec.prompt.end, True))
        if len(self._end) != 1:
            raise BadInput(
                f"the model's vocabulary has no single token {self.spec.prompt.end!r} to end an answer"
            )
        if self.max_tokens < 1:
            raise BadArgument("the token budget must be at least 1")

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        engine: Engine | None = None,
        threads: int | None = None,
        max_tokens: int | None = None,
    ) -> Expander:
        """Load a .gguf file, an MLX or Hugging Face folder, a hub id or a `builtin:` model.

        Prompt, join and token budget come from the model itself; `max_tokens` lowers or raises the budget.

        Raises:
            NotFound, BadInput, NotInstalled: see `qe_edge.models.resolve` and the backends.
        """
        return cls(open_backend(resolve(model), engine=engine, threads=threads), max_tokens=max_tokens)

    @property
    def spec(self) -> ModelSpec:
        return self.backend.spec

    def expand(self, query: str, *, temperature: float = 0.0, seed: int = 0) -> ExpandedQuery:
        """Write one expansion; greedy unless a temperature is given.

        Raises:
            BadInput: the query is blank, or with its expansion doesn't fit the model's context.
        """
        prompt = self.spec.prompt.encode(query, self.backend.tokenize)
        written = self.complete(prompt, temperature=temperature, seed=seed)
        return ExpandedQuery(
            query=query,
            text=" ".join(written.text.split()),
            join=self.spec.join,
            prompt_tokens=len(prompt),
            token_ids=written.token_ids,
            finish_reason=written.finish_reason,
            prefill_s=written.prefill_s,
            decode_s=written.decode_s,
        )

    def complete(self, prompt: list[int], *, temperature: float = 0.0, seed: int = 0) -> Completion:
        """What the model writes after any prompt of token ids, up to its end token or the budget.

        Raises:
            BadInput: prompt and budget together don't fit the model's context.
        """
        start = time.perf_counter()
        if len(prompt) + self.max_tokens > self.backend.context:
            raise BadInput(
                f"the query takes {len(prompt)} tokens with its prompt; with {self.max_tokens} for the "
                f"expansion that is over the model's context of {self.backend.context}. Shorten the query"
            )
        tokens: list[int] = []
        first = None
        finish: Literal["stop", "length"] = "length"
        for token in self.backend.generate(prompt, temperature=temperature, seed=seed):
            first = first or time.perf_counter()
            if token in self._end:
                finish = "stop"
                break
            tokens.append(token)
            if len(tokens) == self.max_tokens:
                break
        end = time.perf_counter()
        return Completion(
            text=self.backend.detokenize(tokens),
            token_ids=tuple(tokens),
            finish_reason=finish,
            prefill_s=(first or end) - start,
            decode_s=end - (first or end),
        )

    def expand_many(self, queries: Iterable[str]) -> Iterator[ExpandedQuery]:
        """Expand queries one after the other, as they come."""
        for query in queries:
            yield self.expand(query)

    def close(self) -> None:
        self.backend.close()

    def __enter__(self) -> Expander:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
