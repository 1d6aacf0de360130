"""`Expander`: load a student once, expand many queries."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

from qe_edge.analysis import analyzer_for, detect_language, get_analyzer
from qe_edge.backends import Backend, open_backend
from qe_edge.decoding import Answer, Decoder
from qe_edge.errors import BadArgument, BadInput
from qe_edge.join import Join
from qe_edge.models import Engine, resolve
from qe_edge.spec import ModelSpec

PARALLEL = 16  # queries decoded together: more bring little, and each takes memory


@dataclass(frozen=True)
class ExpandedQuery:
    """A query with what the student wrote for it.

    `finish_reason` is `stop` when the student ended by itself, `length` when the token budget cut it.
    Times are in seconds: prefill runs until the first token, decode from there to the end. They include the
    steps of the answers that were written at the same time.
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
    """A student ready to expand queries, in as many threads as you like.

    expander = Expander.load("student-Q4_K_M.gguf")
    expander.expand("what causes tides").text
    """

    def __init__(self, backend: Backend, *, max_tokens: int | None = None):
        self.backend = backend
        self.max_tokens = backend.spec.prompt.max_tokens if max_tokens is None else max_tokens
        end = backend.tokenize(self.spec.prompt.end, True)
        if len(end) != 1:
            raise BadInput(
                f"the model's vocabulary has no single token {self.spec.prompt.end!r} to end an answer"
            )
        if self.max_tokens < 1:
            raise BadArgument("the token budget must be at least 1")
        # What every prompt of a language begins with is what two of its prompts have in common.
        self._prefixes = [
            _common(*(self.spec.prompt.encode(query, backend.tokenize) for query in pair))
            for pair in (("a", "7"), ("水", "火"))
        ]
        self._decoder = Decoder(backend, end[0])

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
        answer = self._ask(query, temperature=temperature, seed=seed)
        return self._expanded(query, self._completed(answer), answer)

    def expand_many(self, queries: Iterable[str], *, parallel: int = PARALLEL) -> Iterator[ExpandedQuery]:
        """Expand queries greedily and yield them in their order, some of them read ahead.

        On llama.cpp, `parallel` of them are decoded in one batch, which the next query joins as soon as one
        is done; the room for them is kept. Other engines take one at a time. A batch rounds differently from
        a single sequence, so a near tie between two tokens may be decided differently than alone.

        Raises:
            BadInput: as `expand`, after the queries before it.
        """
        if parallel < 1:
            raise BadArgument("at least 1 query at a time")
        self._decoder.room(parallel)
        coming: Iterator[str] | None = iter(queries)
        problem: Exception | None = None
        asked: deque[tuple[str, Answer]] = deque()
        try:
            while True:
                # As many again wait for their turn, or a place would be empty until the oldest is yielded.
                while coming is not None and len(asked) < 2 * parallel:
                    try:
                        query = next(coming)
                        asked.append((query, self._ask(query)))
                    except StopIteration:
                        coming = None
                    except Exception as error:  # when those before it are yielded
                        coming, problem = None, error
                if not asked:
                    break
                query, answer = asked[0]
                completion = self._completed(answer)
                asked.popleft()
                yield self._expanded(query, completion, answer)
        finally:
            for _, answer in asked:
                answer.abandoned = True
        if problem:
            raise problem

    def complete(
        self, prompt: list[int], *, prefix: int = 0, temperature: float = 0.0, seed: int = 0
    ) -> Completion:
        """What the model writes after any prompt of token ids, up to its end token or the budget.

        The first `prefix` tokens are kept for the next prompt that begins with them.

        Raises:
            BadInput: prompt and budget together don't fit the model's context.
        """
        answer = Answer(prompt, prefix, self.max_tokens, temperature, seed)
        self._decoder.ask(answer)
        return self._completed(answer)

    def _ask(self, query: str, *, temperature: float = 0.0, seed: int = 0) -> Answer:
        if temperature < 0:
            raise BadArgument("a temperature can't be negative")
        prompt = self.spec.prompt.encode(query, self.backend.tokenize)
        prefix = max(len(known) if prompt[: len(known)] == known else 0 for known in self._prefixes)
        answer = Answer(prompt, prefix, self.max_tokens, temperature, seed)
        self._decoder.ask(answer)
        return answer

    def _completed(self, answer: Answer) -> Completion:
        try:
            self._decoder.wait(answer)
        except BaseException:
            answer.abandoned = True
            raise
        assert answer.finish  # else there was an error
        return Completion(
            text=self.backend.detokenize(answer.tokens),
            token_ids=tuple(answer.tokens),
            finish_reason=answer.finish,
            prefill_s=answer.first - answer.begin,
            decode_s=answer.end - answer.first,
        )

    def _expanded(self, query: str, written: Completion, answer: Answer) -> ExpandedQuery:
        return ExpandedQuery(
            query=query,
            text=" ".join(written.text.split()),
            join=self.spec.join,
            prompt_tokens=len(answer.prompt),
            token_ids=written.token_ids,
            finish_reason=written.finish_reason,
            prefill_s=written.prefill_s,
            decode_s=written.decode_s,
        )

    def forget(self) -> None:
        """Drop what is kept of earlier prompts, so that the next one is computed whole."""
        self._decoder.forget()

    def close(self) -> None:
        """Give the memory back. Whoever still waits for an expansion gets an error."""
        self._decoder.close()
        self.backend.close()

    def __enter__(self) -> Expander:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _common(one: list[int], other: list[int]) -> list[int]:
    """What both begin with."""
    return [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))]
