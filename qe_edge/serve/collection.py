"""Search a collection with the plain and with the expanded query, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec

from qe_edge.console import note, warn
from qe_edge.errors import BadArgument
from qe_edge.retrieval.datasets import Dataset, load_collection
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.postings import Strings
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.work.files import atomic_path

CANDIDATES = 100  # of the plain query, among which a hit's earlier rank is looked up


class Hit(msgspec.Struct, frozen=True):
    """One result; `plain_rank` is its rank without the expansion, None when not among CANDIDATES."""

    rank: int
    doc_id: str
    score: float
    plain_rank: int | None
    text: str


class Collection:
    """A data set to be searched: its index and its texts, both mapped from files that are made once.

    Args:
        cache: the folder that holds such files.
        analyzer: instead of that of the collection's language.
    """

    def __init__(self, data: Dataset, cache: Path, *, analyzer: str = ""):
        self.data = data
        self.index = Index.for_dataset(data, cache, analyzer=analyzer)
        folder = cache / f"{data.collection_hash()[:16]}-texts"
        if not folder.exists():
            with atomic_path(folder) as partial:
                partial.mkdir()
                Strings.save((text for _, text in data.documents()), partial / "texts.bin")
        self.texts = Strings.open(folder / "texts.bin")

    @classmethod
    def open(cls, dataset: str, cache: Path, *, analyzer: str = "") -> Collection:
        """By the name or the folder of a data set."""
        return cls(load_collection(dataset), cache, analyzer=analyzer)

    def plain(self, query: str) -> dict[int, float]:
        """Place -> score of the first CANDIDATES for a query as it is, best first."""
        analyzed = self.index.analyze(query)
        return dict(self.index.rank(DEFAULT_JOIN(analyzed, []), CANDIDATES))

    def hits(self, weights: Mapping[str, float], plain: dict[int, float], k: int) -> list[Hit]:
        """The k best for weighted terms."""
        before = {place: rank for rank, place in enumerate(plain, 1)}
        return [
            Hit(rank, self.index.ids[place], round(score, 4), before.get(place), self.texts[place])
            for rank, (place, score) in enumerate(self.index.rank(weights, k), 1)
        ]

    def passages(self, plain: dict[int, float], most: int) -> list[str]:
        """The texts of the best of what `plain` found."""
        return [self.texts[place] for place in list(plain)[:most]]

    def found(self, expanded: ExpandedQuery, most: int) -> list[str]:
        """The texts of the best for an expanded query, for `Expander.refine`."""
        return [self.texts[place] for place, _ in self.index.rank(self.terms(expanded), most)]

    def terms(self, expanded: ExpandedQuery) -> dict[str, float]:
        """The weighted terms of a query in this index."""
        return expanded.terms(self.index.meta.analyzer)


def search(
    query: str,
    collection: Collection,
    *,
    expander: Expander | None,
    feedback: bool = False,
    refine: bool = False,
    k: int = 5,
) -> tuple[list[Hit], ExpandedQuery]:
    """The k best documents for the expanded query; for the plain one without an expander.

    With `feedback` the query is expanded by what the plain one finds, instead of by what the student writes;
    with `refine` also by what the written query finds.
    """
    plain = collection.plain(query)
    scores = list(plain.values())
    if expander and refine:
        found = partial(collection.found, most=expander.passages)
        expanded = expander.refine(query, found, scores=scores)
    elif expander and feedback:
        passages = collection.passages(plain, expander.passages)
        expanded = expander.feedback(query, passages, scores=scores)
    elif expander:
        expanded = expander.expand(query, scores=scores)
    else:
        expanded = ExpandedQuery(query, "", DEFAULT_JOIN)
    return collection.hits(collection.terms(expanded), plain, k), expanded


def warn_of_language(name: str, lang: str, expander: Expander) -> bool:
    """Say so where the texts of a collection are in a language that the student doesn't know; returns it."""
    if foreign := lang not in expander.spec.prompt.languages:
        warn(f"{name} is in {lang}, which the student doesn't know: it finds little there")
    return foreign


def open_collections(named: Sequence[str], cache: Path) -> dict[str, Collection]:
    """Name -> collection of each NAME=DATASET; a folder's own name, where none is given.

    Raises:
        BadArgument: a name is there twice.
        NotFound: there is no such data set.
    """
    collections: dict[str, Collection] = {}
    for text in named:
        name, equals, dataset = text.partition("=")
        if Path(text).exists():  # as it is written
            name, equals = Path(text).resolve().name, ""
        elif equals and not (name and dataset):
            raise BadArgument(f"can't read --index {text}; write NAME=DATASET, or DATASET")
        if name in collections:
            raise BadArgument(
                f"two indexes have the name {name}; give each a NAME of its own, as in --index NAME=DATASET"
            )
        collection = Collection.open(dataset if equals else text, cache)
        note(f"index {name}: {collection.data}, {len(collection.index.ids)} documents")
        collections[name] = collection
    return collections
