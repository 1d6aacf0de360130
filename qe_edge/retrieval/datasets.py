"""Test collections: the two that ship with the package, BEIR folders, and ir_datasets ids.

A data set is written `NAME` or `NAME@SPLIT`, where a split names a file of judgments, also one elsewhere:
`demo-en`, `demo-en@train`, `path/to/beir-folder@dl19`, `dl19`, `beir/scifact/test`, `dl19@other-qrels.tsv`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from itertools import chain, islice
from pathlib import Path

import msgspec

from qe_edge.console import counting, progress, shown
from qe_edge.errors import BadInput, NotFound, QeEdgeError, require
from qe_edge.lines import read_lines
from qe_edge.records import Document, Lang, Query, numbered_jsonl, read_jsonl
from qe_edge.retrieval.judged import Once, check_id, check_ids, parse_grade
from qe_edge.retrieval.official import ORIGIN, read_origin
from qe_edge.retrieval.trec import Qrels
from qe_edge.text import detect_language
from qe_edge.work.files import read_json, write_json
from qe_edge.work.folder import DEFAULT_WORKDIR, user_folder

BUILTIN = ("demo-en", "demo-zh")
# Short names of the collections this field reports on -> their ir_datasets ids.
SHORT_NAMES = {
    "dl19": "msmarco-passage/trec-dl-2019/judged",
    "dl20": "msmarco-passage/trec-dl-2020/judged",
    "dl21": "msmarco-passage-v2/trec-dl-2021/judged",
    "miracl-zh": "miracl/zh/dev",
    "miracl-zh-train": "miracl/zh/train",
    "scifact": "beir/scifact/test",
    "nfcorpus": "beir/nfcorpus/test",
    "fiqa": "beir/fiqa/test",
    "trec-covid": "beir/trec-covid",
    "arguana": "beir/arguana",
    "scidocs": "beir/scidocs",
}
# Beside imported collections: the hashes of large ones, which take minutes to read.
_HASHES, _LARGE = ".hashes.json", 50_000_000
# Beside a collection whose queries and judgments no person made: what made them.
SYNTHETIC = "synthetic.json"
_FIRST = 100  # documents that tell a collection's language where there are no queries
_HEADER = ["query-id", "corpus-id", "score"]


class Dataset:
    """A collection, its judged queries and their judgments; documents are read when asked for."""

    def __init__(
        self,
        name: str,
        split: str,
        queries: dict[str, str],
        qrels: Qrels,
        documents: Callable[[], Iterator[tuple[str, str]]],
        folder: Path | None = None,
        identity: str = "",
    ):
        self.name = shown(name)
        self.split = shown(split)
        self.queries = {query_id: queries[query_id] for query_id in qrels}  # judged queries only
        self.qrels = qrels
        self.documents = documents
        self.folder = folder
        self.identity = identity  # what changes when the documents do, if that is known without reading them
        self.source = ""  # what `load_dataset` was asked for

    @cached_property
    def lang(self) -> Lang:
        """The language of most of the queries, or of the first documents where none are; else English."""
        texts = self.queries.values() or [text for _, text in islice(self.documents(), _FIRST)]
        found = Counter(map(detect_language, texts))
        lang, most = found.most_common(1)[0] if found else ("en", 0)
        return lang if most * 2 > len(texts) else "en"

    def __str__(self) -> str:
        return f"{self.name}@{self.split}" if self.split else self.name

    def draw(self, count: int, seed: int = 0) -> Dataset:
        """The same with `count` of its queries at most, drawn at random; its language stays."""
        chosen = set(random.Random(seed).sample(sorted(self.queries), min(count, len(self.queries))))
        drawn = copy(self)
        drawn.lang = self.lang
        drawn.queries = {query_id: text for query_id, text in self.queries.items() if query_id in chosen}
        drawn.qrels = {query_id: grades for query_id, grades in self.qrels.items() if query_id in chosen}
        return drawn

    def judgments(self) -> int:
        return sum(len(grades) for grades in self.qrels.values())

    def collection_hash(self) -> str:
        """SHA-256 over the documents, in their order; of a large collection, kept for the next time."""
        memo = data_home() / _HASHES
        if self.identity and memo.is_file() and (known := read_json(memo).get(self.identity)):
            return str(known)
        digest = hashlib.sha256()
        with progress(f"reading {self.name}", None) as advance:
            for document in counting(self.documents(), advance):
                digest.update(msgspec.json.encode(document))
        if self.identity:
            with suppress(QeEdgeError, OSError):  # it saves time only
                found = read_json(memo) if memo.is_file() else {}
                write_json(memo, found | {self.identity: digest.hexdigest()})
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """SHA-256 over documents, queries and judgments: two results with the same one are comparable."""
        judged = msgspec.json.encode([sorted(self.queries.items()), self.qrels], order="sorted")
        return hashlib.sha256(self.collection_hash().encode() + judged).hexdigest()

    def check_judgments(self, known: Iterable[str]) -> None:
        """Check that the judgments fit the collection, of which `known` are the document ids.

        Raises:
            BadInput: they name documents that it lacks, so that the ideal ranking can't be reached.
        """
        missing = sorted({doc_id for grades in self.qrels.values() for doc_id in grades}.difference(known))
        if missing:
            raise BadInput(
                f"the judgments of {self} name documents that the collection lacks ({len(missing)} in all), "
                f"such as {', '.join(missing[:3])}; take them out of the judgments or add the documents",
                path=self.folder,
            )


def load_dataset(name: str) -> Dataset:
    """Load `NAME[@SPLIT]`: a folder, else a built-in, an imported one, a short name, an ir_datasets id."""
    found = _load(name)
    found.source = name
    return found


def load_collection(name: str) -> Dataset:
    """As `load_dataset`, but a folder needs no queries and judgments: to search it, or count its words."""
    folder = Path(split_name(name)[0])
    if not folder.is_dir() or (folder / "queries.jsonl").exists():
        return load_dataset(name)
    _check_holds(folder, "corpus.jsonl")
    found = Dataset(folder.resolve().name, "", {}, {}, lambda: read_corpus(folder), folder, _identity(folder))
    found.source = name
    return found


def _load(name: str) -> Dataset:
    base, split = split_name(name)
    folder = Path(base)
    if folder.is_dir():
        return load_folder(folder, split)
    if base in BUILTIN:
        with resources.as_file(resources.files("qe_edge.retrieval") / "data" / base) as path:
            return _load_beir(base, path, split or "test")
    imported = data_home() / base
    if base and (imported / ORIGIN).is_file():
        return _load_beir(base, imported, split)
    if base in SHORT_NAMES or "/" in base:
        return _load_ir_datasets(base, split)
    corpora = chain(Path().glob("*/corpus.jsonl"), Path(DEFAULT_WORKDIR).glob("data/*/corpus.jsonl"))
    known = {path.parent.name: path.parent for path in corpora}
    close = get_close_matches(base.lower(), (*BUILTIN, *SHORT_NAMES, *known), 1)
    hint = f". Did you mean {known.get(close[0], close[0])}?" if close else ""
    ours = ", ".join((*BUILTIN, *SHORT_NAMES))
    raise NotFound(
        f"no data set {base!r}: it is neither the path of a folder, nor one of {ours}, "
        f"nor an ir_datasets id such as beir/nfcorpus/test{hint}"
    )


def split_name(name: str) -> tuple[str, str]:
    """`NAME[@SPLIT]` -> name and split, or an empty one; a folder that exists is a name as it is.

    Folders and a split's file may hold an @, too: the last one behind a folder counts.
    """
    if "@" not in name or Path(name).is_dir():
        return name, ""
    places = [at for at, letter in enumerate(name) if letter == "@"]
    folders = [at for at in places if Path(name[:at]).is_dir()]
    at = folders[-1] if folders else places[0] if name.endswith(".tsv") else places[-1]
    return name[:at], name[at + 1 :]


def load_folder(folder: Path, split: str = "") -> Dataset:
    """Load a split of a folder in BEIR layout."""
    return _load_beir(folder.resolve().name, folder, split)


def data_home() -> Path:
    """Where imported collections lie: QE_EDGE_DATA, or a folder of the user's."""
    return Path(os.environ.get("QE_EDGE_DATA") or user_folder() / "data")


def load_queries(path: Path) -> Dataset:
    """A file of queries (`_id` and `text`, JSON Lines) as a data set without documents and judgments.

    Raises:
        NotFound, BadInput: there is none, or it holds no query.
    """
    queries = _read_queries(path)
    if not queries:
        raise BadInput("holds no query", path=path)
    return Dataset(path.stem, "", queries, {query_id: {} for query_id in queries}, lambda: iter(()))


def builtin_folder(name: str) -> Path:
    """Where a built-in data set's files lie."""
    return Path(str(resources.files("qe_edge.retrieval") / "data" / name))


def splits(folder: Path) -> list[str]:
    """The splits of a BEIR folder. (Hidden files are no data: some systems leave theirs in any folder.)"""
    return sorted(path.stem for path in (folder / "qrels").glob("[!.]*.tsv"))


def _load_beir(name: str, folder: Path, split: str) -> Dataset:
    _check_holds(folder, "corpus.jsonl", "queries.jsonl", "qrels")
    found, elsewhere = splits(folder), _elsewhere(split)
    if not split:
        if "test" not in found and len(found) != 1:
            raise NotFound(
                f"{folder} has the splits {', '.join(found) or '(none)'}; name one, as in {name}@SPLIT"
            )
        split = "test" if "test" in found else found[0]
    if split not in found and not elsewhere:
        raise NotFound(f"{name} has no split {split!r}; there are: {', '.join(found) or '(none)'}")
    origin = read_origin(folder)
    if origin and origin.pool:
        name = f"{name} pool"
    if (folder / SYNTHETIC).is_file():  # every figure says so
        name = f"{name}-synthetic"
    queries = _read_queries(folder / "queries.jsonl")
    qrels = _read_qrels(elsewhere or folder / "qrels" / f"{split}.tsv", queries)
    split = elsewhere.stem if elsewhere else split
    return Dataset(name, split, queries, qrels, lambda: read_corpus(folder), folder, _identity(folder))


def _check_holds(folder: Path, *needed: str) -> None:
    for name in needed:
        if not (folder / name).exists():
            remedy = f"`qe-edge data make {folder}` makes one of notes, and says where"
            if name != "corpus.jsonl":
                remedy = "`qe-edge data queries` has a model write queries for a corpus"
            raise NotFound(
                f"{folder} has no {name}; a data set folder holds corpus.jsonl, queries.jsonl and "
                f"qrels/<split>.tsv ({remedy})"
            )


def _identity(folder: Path) -> str:
    corpus = folder / "corpus.jsonl"
    stat = corpus.stat()
    return f"{corpus.resolve()} {stat.st_size} {stat.st_mtime_ns}" if stat.st_size > _LARGE else ""


def _elsewhere(split: str) -> Path | None:
    """The file that a split is, which lies outside of the data set."""
    path = Path(split)
    return path if path.suffix == ".tsv" and path.is_file() else None


def read_corpus(folder: Path) -> Iterator[tuple[str, str]]:
    """Id and text of each document of a BEIR folder, the title before the text."""
    for document in read_jsonl(folder / "corpus.jsonl", Document):
        yield document.id, f"{document.title or ''} {document.text}".strip()


def _read_queries(path: Path) -> dict[str, str]:
    queries = Once[str, str]("query", path)
    for number, query in numbered_jsonl(path, Query):
        check_id(query.id, "query", path, number)
        queries.add(number, query.id, query.text)
    return queries.rows


def _read_qrels(path: Path, queries: dict[str, str]) -> Qrels:
    lines = read_lines(path)
    if next(lines, (1, ""))[1].split("\t") != _HEADER:
        raise BadInput(f"the first line must be {' '.join(_HEADER)}, separated by tabs", path=path, line=1)
    judged = Once[tuple[str, str], int]("the judgment of", path)
    for number, line in lines:
        if not line:
            continue
        try:
            query_id, doc_id, grade = line.split("\t")
            score = parse_grade(grade)
        except ValueError:
            raise BadInput(
                f"expected query-id, corpus-id and a whole-number score, got {line[:100]!r}",
                path=path,
                line=number,
            ) from None
        if query_id not in queries:
            raise BadInput(f"query {query_id!r} is not in queries.jsonl", path=path, line=number)
        judged.add(number, (query_id, doc_id), score)
    if not judged.rows:
        raise BadInput("holds no judgment", path=path)
    return grouped(judged.rows)


def grouped(judgments: Mapping[tuple[str, str], int]) -> Qrels:
    """Grades by query and document id."""
    qrels: Qrels = {}
    for (query_id, doc_id), grade in judgments.items():
        qrels.setdefault(query_id, {})[doc_id] = grade
    return qrels


def _load_ir_datasets(name: str, split: str) -> Dataset:
    ir_datasets = require("ir_datasets", "data")
    elsewhere = _elsewhere(split)
    dataset_id = SHORT_NAMES.get(name, name) + (f"/{split}" if split and not elsewhere else "")
    try:
        source = ir_datasets.load(dataset_id)
    except KeyError:
        path = Path(name)
        named = path.suffix == ".tsv" and path.parent.name == "qrels"
        hint = f"; a folder's split is {path.parents[1]}@{path.stem}" if named else ""
        if path.is_file() and (path.parent / "corpus.jsonl").is_file():
            hint = hint or f"; its folder is {path.parent}"
        elif not hint:
            hint = "; `qe-edge data list` lists those that are known"
        others = [other.name for other in path.parent.glob("*") if other.is_dir()]
        if close := get_close_matches(path.name, others, 1):
            hint = f". Did you mean {path.parent / close[0]}?"
        asked = "" if dataset_id == name or name.startswith((".", "/")) else f" ({dataset_id})"
        raise NotFound(f"{name!r} is neither a folder nor an ir_datasets id{asked}{hint}") from None
    try:
        queries = {query.query_id: query.default_text() for query in source.queries_iter()}
        qrels: Qrels = _read_qrels(elsewhere, queries) if elsewhere else {}
        for judgment in () if elsewhere else source.qrels_iter():
            if judgment.query_id in queries:
                grades = qrels.setdefault(judgment.query_id, {})
                if grades.setdefault(judgment.doc_id, judgment.relevance) != judgment.relevance:
                    raise BadInput(
                        f"{dataset_id} has two grades of {judgment.doc_id} for query {judgment.query_id}"
                    )
    except AttributeError:
        raise NotFound(
            f"ir_datasets has no queries or no judgments for {dataset_id}; name a split of it"
        ) from None
    except (OSError, RuntimeError) as error:
        raise _out_of_reach(name, dataset_id, error) from None

    def documents() -> Iterator[tuple[str, str]]:
        try:
            for document in source.docs_iter():
                yield document.doc_id, document.default_text()
        except (OSError, RuntimeError) as error:
            raise _out_of_reach(name, dataset_id, error) from None

    for query_id in qrels:
        check_id(query_id, "query", None)
    version = importlib.metadata.version("ir-datasets")
    identity = f"ir_datasets {version} {dataset_id}"
    split = elsewhere.stem if elsewhere else split
    return Dataset(name, split, queries, qrels, documents, identity=identity)


def _out_of_reach(name: str, dataset_id: str, error: Exception) -> NotFound:
    why = error.args[0] if isinstance(error, RuntimeError) else error  # ir_datasets has logged all its tries
    return NotFound(
        f"{dataset_id} could not be downloaded ({why}). Where its host is out of reach, bring the "
        f"official files: `qe-edge data import {name} --topics FILE --qrels FILE --passages FILE`, or "
        "give a folder in BEIR layout as the data set"
    )


class DatasetInfo(msgspec.Struct, frozen=True):
    """The size of a data set, for people and for results."""

    name: str
    lang: Lang
    documents: int
    queries: int
    judgments: int


def describe(
    dataset: Dataset, ids: Sequence[str] | None = None, *, documents: int | None = None
) -> DatasetInfo:
    """Count a data set, checking its judgments on the way; `ids` are its documents', if they are known.

    With `documents`, they are elsewhere, and are not looked at.
    """
    if documents is not None:
        return DatasetInfo(str(dataset), dataset.lang, documents, len(dataset.queries), dataset.judgments())
    if ids is None:
        ids = [doc_id for doc_id, _ in dataset.documents()]
        check_ids(ids, dataset.folder)
    dataset.check_judgments(ids)
    return DatasetInfo(str(dataset), dataset.lang, len(ids), len(dataset.queries), dataset.judgments())
