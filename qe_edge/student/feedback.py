"""Corpus feedback: what the plain query found expands it, as far as the student believes that it answers.

A relevance model (Lavrenko & Croft, SIGIR 2001): P(term | query) is the sum over passages of
P(query | passage) P(term | passage). The first is the student's, who reads the passage and writes nothing.
"""

from __future__ import annotations

import math
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Annotated

import msgspec

from qe_edge.records import Count, Lang, Positive
from qe_edge.student.join import Join
from qe_edge.student.prompt import PromptSpec, Tokenize, clean_query, clean_text, encode, plain

DEFAULT_TEXTS = "feedback-v1"
MOST_PASSAGES, MOST_TOKENS = 50, 256
Passages = Annotated[int, msgspec.Meta(ge=1, le=MOST_PASSAGES)]
CHARACTERS = 16  # of a token, at most: four is usual
LEAST = 0.01  # of the heaviest term's weight: engines without weights would count a lighter one as a word


class FeedbackText(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The words around a passage in one language; `user` holds `{passage}` once."""

    system: str
    user: str

    def __post_init__(self) -> None:
        if self.user.count("{passage}") != 1:
            raise ValueError("the user text must hold {passage} exactly once")


def default_texts() -> dict[Lang, FeedbackText]:
    """The texts that ship with the package."""
    file = resources.files("qe_edge.student") / "prompts" / f"{DEFAULT_TEXTS}.toml"
    return msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), dict[Lang, FeedbackText])


class Feedback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How passages expand a query. It travels inside the exported model.

    Of the best `passages` of the plain query the student reads the first `tokens` tokens each. Its
    log-likelihoods of the query, in nats per token, are divided by `temperature` before they become
    weights. (Per token: as sums, those of a long query would differ so much that a single passage decides.)
    An encoder has its own `tokens` and `temperature`.
    The `terms` heaviest terms of the mixture are joined with the query by `join`.
    """

    texts: dict[Lang, FeedbackText] = msgspec.field(default_factory=default_texts)
    passages: Passages = 10
    tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)] = 64
    temperature: Positive = 0.25
    terms: Count = 60
    join: Join = Join("mass", 3)

    def __post_init__(self) -> None:
        if not self.texts:
            raise ValueError("feedback needs a text in at least one language")

    def beginning(self, passage: str) -> str:
        """The part of a passage that counts: of a whole document, what may be read and a little more."""
        most = CHARACTERS * self.tokens
        return clean_text(passage[: 2 * most])[:most]

    def encode(
        self, query: str, passages: Sequence[str], prompt: PromptSpec, tokenize: Tokenize
    ) -> tuple[list[list[int]], list[int], int]:
        """A prompt for each passage, the query as the answer to them, and how many tokens all begin with.

        Raises:
            BadInput: the query is blank.
        """
        text = self.texts.get(prompt.language_of(query)) or next(iter(self.texts.values()))
        before, after = text.user.split("{passage}")
        start = encode(prompt.opening(text.system, before), tokenize)
        end = encode(prompt.closing(after), tokenize)
        read = [encode(plain(self.beginning(passage)), tokenize)[: self.tokens] for passage in passages]
        return [start + ids + end for ids in read], encode(plain(clean_query(query)), tokenize), len(start)

    def weigh(self, values: Sequence[float]) -> tuple[float, ...]:
        """The passages' weights, whose sum is 1, by what they are worth."""
        best = max(values)
        weights = [math.exp((value - best) / self.temperature) for value in values]
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class RelevanceModel:
    """Passages with their weights, of whose mixture the `most` heaviest terms expand a query by `join`."""

    passages: tuple[str, ...]
    weights: tuple[float, ...]
    most: int
    join: Join

    def terms(self, analyze: Callable[[str], list[str]]) -> dict[str, float]:
        """P(term | query) of the heaviest terms, heaviest first; of equal ones, in the text's order."""
        mixture: dict[str, float] = defaultdict(float)
        for passage, weight in zip(self.passages, self.weights, strict=True):
            terms = analyze(passage)
            for term, count in Counter(terms).items():
                mixture[term] += weight * count / len(terms)
        heaviest = sorted(mixture.items(), key=lambda item: -item[1])[: self.most]
        return {term: weight for term, weight in heaviest if weight > LEAST * heaviest[0][1]}
