"""Few-shot exemplars: training queries with a passage that answers them, drawn by a named, seeded rule."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal

from qe_edge.analysis import analyzer_for, detect_language, get_analyzer
from qe_edge.datasets import Dataset, load_dataset, splits
from qe_edge.errors import BadArgument, BadInput
from qe_edge.index import Index
from qe_edge.prompt import Exemplar
from qe_edge.records import Lang

Rule = Literal["random", "bm25"]
# Characters; a longer passage is cut at a sentence's end. Exemplars are paid for with every request.
LONGEST = {"en": 600, "zh": 200}


class Exemplars:
    """The exemplars of every query.

    - `random`: one seeded order of the pool; each query takes the first that it may, so nearly all
      prompts begin alike and an endpoint's prefix cache serves them.
    - `bm25`: the training queries nearest to the query, then the seeded order.

    A query is never shown itself, nor a query of another split of the exemplars' collection, nor one that
    is being expanded as test data, whatever its id; queries with the same index terms count as the same.
    """

    def __init__(self, source: Dataset, expanded: Dataset, *, rule: Rule, shots: int, seed: int):
        self.rule, self.shots = rule, shots
        pool = _pool(source, _held_out(source, expanded))
        random.Random(seed).shuffle(pool)
        self._pool: dict[Lang, list[Exemplar]] = {"en": [], "zh": []}
        for exemplar in pool:
            self._pool[detect_language(exemplar.query)].append(exemplar)
        self._index: dict[Lang, Index] = {}
        self._chosen: dict[str, list[Exemplar]] = {}

    def of(self, query: str) -> list[Exemplar]:
        """The query's exemplars, in its own language.

        Raises:
            BadInput: the pool holds too few.
        """
        if query not in self._chosen:
            own = _same(query)
            found = [e for e in self._ranked(query) if _same(e.query) != own][: self.shots]
            if len(found) < self.shots:
                raise BadInput(
                    f"only {len(found)} of {self.shots} exemplars may be shown with the query {query!r}; "
                    "give a larger training split, or lower --shots"
                )
            self._chosen[query] = found
        return self._chosen[query]

    def _ranked(self, query: str) -> Iterable[Exemplar]:
        lang = detect_language(query)
        pool = self._pool[lang]
        if self.rule == "random" or not pool:
            return pool
        if lang not in self._index:
            texts = ((str(i), exemplar.query) for i, exemplar in enumerate(pool))
            self._index[lang] = Index.build(texts, analyzer=analyzer_for(lang))
        index = self._index[lang]
        weights = dict.fromkeys(index.analyze(query), 1.0)
        near = [int(i) for i, _ in index.search(weights, k=self.shots + 5)]  # some may be the query itself
        return [pool[i] for i in near] + [e for i, e in enumerate(pool) if i not in set(near)]


def load_exemplars(name: str, expanded: Dataset, *, rule: Rule, shots: int, seed: int) -> Exemplars:
    """Exemplars from a data set's training split; without a name, from that of the expanded one.

    Raises:
        BadArgument: the split is for testing, or there is no training split to take by default.
    """
    if not name:
        if expanded.folder is None or "train" not in splits(expanded.folder):
            raise BadArgument(
                f"{expanded} has no training split to take few-shot exemplars from; "
                "name one with --exemplars NAME@train, or ask zero-shot alone"
            )
        name = f"{expanded.folder}@train"
    source = load_dataset(name)
    if source.split.startswith(("test", "dev")):
        raise BadArgument(
            f"exemplars must not come from test queries, and {source} holds such; name a training split"
        )
    return Exemplars(source, expanded, rule=rule, shots=shots, seed=seed)


def _held_out(source: Dataset, expanded: Dataset) -> set[tuple[str, ...]]:
    """No exemplar may be a query of the collection's other splits, or one expanded from elsewhere."""
    texts: list[str] = []
    if (source.folder, source.name, source.split) != (expanded.folder, expanded.name, expanded.split):
        texts += expanded.queries.values()
    if source.folder:
        for split in splits(source.folder):
            if split != source.split:
                texts += load_dataset(f"{source.folder}@{split}").queries.values()
    return {_same(text) for text in texts}


def _pool(source: Dataset, held_out: set[tuple[str, ...]]) -> list[Exemplar]:
    """Every allowed query with its best judged passage."""
    best: dict[str, str] = {}
    for query_id, query in source.queries.items():
        grades = source.qrels[query_id]
        doc_id = max(grades, key=grades.__getitem__)
        if grades[doc_id] > 0 and _same(query) not in held_out:
            best[query_id] = doc_id
    wanted = set(best.values())
    texts = {doc_id: text for doc_id, text in source.documents() if doc_id in wanted}
    return [
        Exemplar(source.queries[query_id], shortened(texts[doc_id]))
        for query_id, doc_id in best.items()
        if texts.get(doc_id)
    ]


def shortened(text: str) -> str:
    """The text up to its last sentence end within the limit, or the limit itself where there is none."""
    text = " ".join(text.split())
    limit = LONGEST[detect_language(text)]
    if len(text) <= limit:
        return text
    head = text[:limit]
    end = max(head.rfind(mark) for mark in (". ", "! ", "? ", "。", "！", "？"))
    return head[: end + 1] if end > 0 else head


def _same(query: str) -> tuple[str, ...]:
    """What makes two queries the same: their index terms, or their letters where they have none."""
    terms = get_analyzer(analyzer_for(detect_language(query)))(query)
    return tuple(sorted(set(terms))) or (query.casefold(),)
