"""The settings of `data queries` and `data judge`: their flags are made of them."""

from __future__ import annotations

from typing import Annotated

from qe_edge.records import Count, Seed, said
from qe_edge.train.teach.config import AskConfig


class QueriesConfig(AskConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What queries are asked for.

    `passages` of the collection, every file's turn coming before any file's second one, give `n` each, of
    which those stay whose passage is found again.
    """

    passages: Annotated[Count, said("Passages to write queries for, at most.")] = 1000
    n: Annotated[Count, said("Queries for each passage.")] = 1
    temperature: Annotated[float, said("0 is greedy.", ge=0, le=10)] = 0.7
    seed: Annotated[Seed, said("Random seed; a passage's later queries count on from it.")] = 0
    max_tokens: Annotated[Count, said("Token budget of one answer.")] = 48
    prompt: Annotated[str, said("A shipped prompt's id, or a TOML file.")] = "queries-v1"
    found_in: Annotated[
        Count, said("Drop a query whose passage is not among the first so many of BM25 or the reader.")
    ] = 20
    reader: Annotated[str, said("An encoder's GGUF that may find the passage where BM25 doesn't.")] = ""
    test_share: Annotated[
        float, said("Share of the files whose queries are for testing, not for training.", ge=0.05, le=0.95)
    ] = 0.3


class JudgeConfig(AskConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What grades are asked for: of the first `depth` documents of every system, for each query."""

    depth: Annotated[Count, said("Documents of each system that are graded, for each query.")] = 10
    temperature: Annotated[float, said("0 is greedy.", ge=0, le=10)] = 0.0
    seed: Annotated[Seed, said("Random seed.")] = 0
    max_tokens: Annotated[Count, said("Token budget of one answer.")] = 16
    prompt: Annotated[str, said("A shipped prompt's id, or a TOML file.")] = "judge-v1"
