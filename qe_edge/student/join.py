"""query + expansion -> weighted terms, by a named rule.

A term that occurs n times has weight n; an index that searches weighted unique terms scores the same
as one given the repeated string, for less work.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from qe_edge.arguments import check_kind
from qe_edge.errors import BadArgument

Rule = Literal["repeat", "adaptive", "mass"]
LEAST, MOST = 1e-9, 1e9  # of a value: far beyond, floating-point weights vanish or overflow
_MEANING = {
    "repeat": "how often the query is repeated (Query2Doc: 5)",
    "adaptive": "beta of words(expansion) // words(query) // beta (MuGI: 5)",
    "mass": "the expansion's total weight as a multiple of the query's",
}


class Join(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far an expansion is trusted beside its query.

    - `repeat`: the query's terms count `value` times (Query2Doc, arXiv 2303.07678).
    - `adaptive`: the query is repeated |expansion| // |query| // `value` times, at least once (MuGI,
      arXiv 2401.06311); lengths are counted in analysed terms, so that Chinese counts alike.
    - `mass`: the expansion is scaled to `value` times the query's total weight, whatever the lengths.
    """

    rule: Rule = "mass"
    value: float = 0.7

    def __post_init__(self) -> None:
        if self.rule not in _MEANING:
            raise ValueError(f"a join's rule must be one of {', '.join(_MEANING)}, not {self.rule!r}")
        check_kind("a join's value", self.value, (int, float), "a number")
        if not LEAST <= self.value <= MOST:  # nan is neither
            raise ValueError(f"a join's value must be from {LEAST:g} to {MOST:g}")

    def __str__(self) -> str:
        return f"{self.rule}:{self.value:g}"

    @classmethod
    def parse(cls, text: str) -> Join:
        """`mass:0.7`, `repeat:5` or `adaptive:5`."""
        rule, _, value = text.partition(":")
        try:
            return msgspec.convert({"rule": rule, "value": float(value)}, cls)
        except (ValueError, msgspec.ValidationError):
            rules = "; ".join(f"{name}:N, N = {meaning}" for name, meaning in _MEANING.items())
            raise BadArgument(f"can't read the join {text!r}. Write one of: {rules}") from None

    def __call__(
        self, query_terms: Sequence[str], expansion_terms: Sequence[str] | Mapping[str, float]
    ) -> dict[str, float]:
        """Weights of the unique terms. Without expansion terms: the plain query, each term counted.

        Expansion terms in a row count once each; of a mapping, as much as it says.
        """
        counts: Mapping[str, float] = Counter(expansion_terms)
        of_query, of_expansion = self.scales(len(query_terms), sum(counts.values()))
        weights = {term: of_query * count for term, count in Counter(query_terms).items()}
        for term, count in counts.items():
            weights[term] = weights.get(term, 0.0) + of_expansion * count
        return weights

    def scales(self, query_length: int, expansion_length: float) -> tuple[float, float]:
        """What one occurrence of a term weighs in the query and in the expansion; lengths are in terms."""
        if not query_length or not expansion_length:
            return 1.0, 1.0
        if self.rule == "repeat":
            return self.value, 1.0
        if self.rule == "adaptive":
            return max(1.0, expansion_length // query_length // self.value), 1.0
        return 1.0, self.value * query_length / expansion_length


Part = tuple[Join, "Sequence[str] | Mapping[str, float]"]
"""An expansion, and how it is joined with the query."""


def joined(query_terms: Sequence[str], parts: Sequence[Part]) -> dict[str, float]:
    """Weights of a query with several expansions, each trusted beside the query as its own join says."""
    there = [(join, terms) for join, terms in parts if terms]
    if len(there) < 2:
        join, terms = there[0] if there else (DEFAULT_JOIN, [])
        return join(query_terms, terms)
    weights: dict[str, float] = dict(Counter(query_terms))
    for join, terms in there:
        counts: Mapping[str, float] = Counter(terms)
        of_query, of_expansion = join.scales(len(query_terms), sum(counts.values()))
        for term, count in counts.items():
            weights[term] = weights.get(term, 0.0) + of_expansion / of_query * count
    return weights


DEFAULT_JOIN = Join()
# Query2Doc's rule, under which the teachers' published expansions were measured.
TEACHER_JOIN = Join("repeat", 5)
