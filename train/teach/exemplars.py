"""Few-shot exemplars: training queries with a passage that answers them, drawn by a named, seeded rule."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain, islice
from typing import NamedTuple

from qe_edge.errors import BadArgument, BadInput
from qe_edge.records import Lang
from qe_edge.retrieval.datasets import SHORT_NAMES, Dataset, load_dataset, load_folder, splits
from qe_edge.retrieval.index import Index
from qe_edge.student.prompt import Exemplar
from qe_edge.text import analyzer_for, detect_language, get_analyzer
from qe_edge.train.teach.config import Rule

# Characters; a longer passage is cut at a sentence's end. Exemplars are paid for with every request.
LONGEST: dict[Lang, int] = {"en": 600, "zh": 200, "other": 600}


class Exemplars:
    """The exemplars of every query.

    - `random`: one seeded order of the pool; each query takes the first that it may, so nearly all
      prompts begin alike and an endpoint's prefix cache serves them.
    - `bm25`: the training queries nearest to the query, then the seeded order.

    A query is never shown itself, nor a passage judged relevant for it, nor a query of another split of the
    exemplars' folder, nor one that is being expanded as test data, whatever its id; queries with the same
    index terms count as the same. (The other splits of an ir_datasets id are not known.)
    """

    def __init__(self, source: Dataset, expanded: Dataset, *, rule: Rule, shots: int, seed: int):
        self.rule, self.shots = rule, shots
        # Document ids mean the same only within one collection.
        self._judged = expanded.qrels if _folder(source) == _folder(expanded) else {}
        pool = _pool(source, _held_out(source, expanded))
        random.Random(seed).shuffle(pool)
        self._pool: defaultdict[Lang, list[_Shown]] = defaultdict(list)
        for shown in pool:
            self._pool[detect_language(shown.exemplar.query)].append(shown)
        self._index: dict[Lang, Index] = {}
        self._chosen: dict[str, list[Exemplar]] = {}

    def of(self, query_id: str, query: str) -> list[Exemplar]:
        """The query's exemplars, in its own language; English ones where that is neither Chinese nor there.

        Raises:
            BadInput: the pool holds too few.
        """
        if query_id not in self._chosen:
            own = _same(query)
            relevant = {doc_id for doc_id, grade in self._judged.get(query_id, {}).items() if grade > 0}
            allowed = (
                shown.exemplar
                for shown in self._ranked(query)
                if shown.same != own and shown.doc_id not in relevant  # its passage would be the answer
            )
            found = list(islice(allowed, self.shots))
            if len(found) < self.shots:
                raise BadInput(
                    f"only {len(found)} of {self.shots} exemplars may be shown with the query {query!r}; "
                    "give a larger training split, or lower --shots"
                )
            self._chosen[query_id] = found
        return self._chosen[query_id]

    def _ranked(self, query: str) -> Iterable[_Shown]:
        lang = detect_language(query)
        if lang == "other" and not self._pool[lang]:
            lang = "en"
        pool = self._pool[lang]
        if self.rule == "random" or not pool:
            return pool
        if lang not in self._index:
            texts = ((str(i), shown.exemplar.query) for i, shown in enumerate(pool))
            self._index[lang] = Index.build(texts, analyzer=analyzer_for(lang))
        index = self._index[lang]
        weights = dict.fromkeys(index.analyze(query), 1.0)
        near = [int(i) for i, _ in index.search(weights, k=self.shots + 20)]  # some may not be shown
        taken = set(near)
        return chain((pool[i] for i in near), (shown for i, shown in enumerate(pool) if i not in taken))


class _Shown(NamedTuple):
    exemplar: Exemplar
    doc_id: str
    same: tuple[str, ...]


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
        return Exemplars(load_folder(expanded.folder, "train"), expanded, rule=rule, shots=shots, seed=seed)
    source = load_dataset(name)
    # A split of a folder, or a part of an ir_datasets id such as msmarco-passage/train/judged.
    parts = (
        [source.split]
        if source.folder
        else f"{SHORT_NAMES.get(source.name, source.name)}/{source.split}".split("/")
    )
    if not any(part.startswith("train") for part in parts):
        raise BadArgument(
            f"exemplars must not come from test queries, and {source} is no training split; name NAME@train"
        )
    return Exemplars(source, expanded, rule=rule, shots=shots, seed=seed)


def _folder(data: Dataset) -> str:
    return str(data.folder.resolve()) if data.folder else data.name


def _held_out(source: Dataset, expanded: Dataset) -> set[tuple[str, ...]]:
    """No exemplar may be a query of the collection's other splits, or one expanded from elsewhere."""
    texts: list[str] = []
    if (_folder(source), source.split) != (_folder(expanded), expanded.split):
        texts += expanded.queries.values()
    if source.folder:
        for split in splits(source.folder):
            if split != source.split:
                texts += load_folder(source.folder, split).queries.values()
    return {_same(text) for text in texts}


def _pool(source: Dataset, held_out: set[tuple[str, ...]]) -> list[_Shown]:
    """Every allowed query with its best judged passage."""
    best: dict[str, tuple[str, tuple[str, ...]]] = {}
    for query_id, query in source.queries.items():
        grades, same = source.qrels[query_id], _same(query)
        doc_id = max(grades, key=grades.__getitem__)
        if grades[doc_id] > 0 and same not in held_out:
            best[query_id] = doc_id, same
    wanted = {doc_id for doc_id, _ in best.values()}
    texts = {doc_id: text for doc_id, text in source.documents() if doc_id in wanted}
    return [
        _Shown(Exemplar(source.queries[query_id], shortened(texts[doc_id])), doc_id, same)
        for query_id, (doc_id, same) in best.items()
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
