"""Queries for a collection that has none: a teacher writes what a passage answers, retrieval checks it."""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from qe_edge.console import progress
from qe_edge.documents.folder import CORPUS
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.records import Document, Problem, Query, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import SYNTHETIC, Dataset, read_corpus
from qe_edge.retrieval.dense import DenseIndex
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.official import QRELS_HEADER
from qe_edge.runtime.reader import Encoder
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.text import analyzer_for, count_words, detect_language, get_analyzer
from qe_edge.train.synthetic.config import QueriesConfig
from qe_edge.train.synthetic.prompts import PassagePrompt, load_passage_prompt
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.problems import problem_of
from qe_edge.train.teach.session import Outcome, ask_all, check_done, open_teacher
from qe_edge.train.teach.teacher import Answer, Request
from qe_edge.work.files import remove, sha256, write_bytes, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.machine import usable_cores

ASKED = "queries-asked.jsonl"
SHORTEST, LONGEST = 15, 32  # words: of a passage that can answer anything, and of a query
NEAR_DUPLICATE = 0.8  # share of index terms in common
_LABEL = re.compile(
    r"^\W*((search )?query|search|question|keywords|搜索|查询|问题|关键词)\s*[:：]\s*", re.IGNORECASE
)
_OF_THE_TEXT = re.compile(r"\b(this|the) (text|passage)\b|这段(文字|话)|(文|段落)中|本文", re.IGNORECASE)


class AskedQuery(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a teacher wrote for a passage, and what is wrong with it, if anything is."""

    document: str
    text: str
    model: str
    prompt_id: str
    key: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    problem: Problem | None = None


class Report(msgspec.Struct, frozen=True):
    """What became of the queries: how many each split has, and how many were dropped, by reason."""

    train: int
    test: int
    dropped: dict[str, int]


class _Ask(NamedTuple):
    document: Document
    sample: int
    style: int


class PassageQueries:
    """The plan of a session: a query of every passage, then the second one of each, and so on."""

    def __init__(self, documents: Sequence[Document], config: QueriesConfig, prompt: PassagePrompt):
        self.documents, self.config, self.prompt = documents, config, prompt

    def __len__(self) -> int:
        return len(self.documents) * self.config.n

    def __iter__(self) -> Iterator[_Ask]:
        for sample in range(self.config.n):
            for document in self.documents:
                # By the text, so that passages that come or go change no other one's request.
                style = _digest(document.text)[0] + sample
                yield _Ask(document, sample, style)

    def name(self, job: _Ask) -> str:
        return f"passage {job.document.id} (query {job.sample + 1})"

    def request(self, job: _Ask) -> Request:
        config = self.config
        system, user = self.prompt.messages(job.document, style=job.style)
        return Request(
            model=config.model,
            system=system,
            user=user,
            temperature=float(config.temperature),
            seed=config.seed + job.sample,
            max_tokens=config.max_tokens,
            extra=config.extra,
        )

    def key(self, job: _Ask) -> str:
        return _digest(msgspec.json.encode(self.request(job), order="deterministic")).hex()[:16]

    def row(self, job: _Ask, answer: Answer, *, keep_bad: bool) -> AskedQuery:
        text = clean_answer(answer.text)
        problem = problem_of(job.document.text, text, answer.finish_reason)
        if problem in ("copy of the query", "cut"):  # a query may well hold nothing but words of its passage
            whole = answer.finish_reason != "length" or "\n" in answer.text.strip()
            problem = None if whole else "cut"
        return AskedQuery(
            document=job.document.id,
            text=text if not problem or keep_bad else "",
            model=self.config.model,
            prompt_id=self.prompt.id,
            key=self.key(job),
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            problem=problem,
        )


def write_queries(folder: Path, config: QueriesConfig, *, workdir: Workdir) -> tuple[Outcome, Report | None]:
    """Give a folder with corpus.jsonl queries.jsonl and qrels/train.tsv and test.tsv, all synthetic.

    A query's judgment is its passage, with grade 1: a known item. Every answer is kept in ASKED, so that the
    same call, after an interruption or a change of the collection, asks only for what is new. Without a
    report, answers are missing and nothing but them was written.

    Raises:
        NotFound, BadArgument: there is no collection, or it has queries that we did not write.
        BadInput: no query is left.
    """
    documents = choose_passages(folder, config)
    prompt = load_passage_prompt(config.prompt)
    teacher = open_teacher(config, max_tokens=config.max_tokens) if config.endpoint else None
    plan = PassageQueries(documents, config, prompt)
    with Ledger(folder / ASKED, AskedQuery, "data queries", "queries") as ledger:
        outcome, error = ask_all(plan, ledger, config, teacher, max_tokens=config.max_tokens)
    check_done(outcome, error)
    if outcome.done < outcome.candidates:
        return outcome, None
    answers = {row.key: row for row in read_jsonl(folder / ASKED, AskedQuery)}
    dropped: Counter[str] = Counter()
    written: dict[str, tuple[str, str]] = {}  # query id -> text, document
    for job in plan:
        row = answers[plan.key(job)]
        if row.problem or not row.text:
            dropped[row.problem or "empty"] += 1
        elif count_words(row.text) > LONGEST:
            dropped["too long"] += 1
        elif _OF_THE_TEXT.search(row.text):
            dropped["about the text"] += 1
        else:
            written[f"q-{row.key}"] = row.text, job.document.id
    kept = _found_again(folder, written, config, workdir, dropped)
    for query_id in near_duplicates({query_id: text for query_id, (text, _) in kept.items()}):
        dropped["like another one"] += 1
        del kept[query_id]
    if not kept:
        what = ", ".join(f"{count} {why}" for why, count in dropped.items())
        raise BadInput(f"no query is left of {len(plan)}: {what}; take another model", path=folder / ASKED)
    test = test_sources({document for _, document in kept.values()}, config.test_share, seed=config.seed)
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for query_id, (_, document) in kept.items():
        splits["test" if source_of(document) in test else "train"].append(f"{query_id}\t{document}\t1\n")
    report = Report(len(splits["train"]), len(splits["test"]), dict(dropped))
    # What says that they are synthetic comes first: no moment may show them as others.
    about = {"model": config.model, "prompt": config.prompt, **msgspec.to_builtins(report)}
    write_json(folder / SYNTHETIC, about)
    rows = [Query(id=query_id, text=text) for query_id, (text, _) in kept.items()]
    write_bytes(folder / "queries.jsonl", encode_jsonl(rows))
    for split, lines in splits.items():
        file = folder / "qrels" / f"{split}.tsv"
        if lines:
            write_bytes(file, (QRELS_HEADER + "".join(lines)).encode())
        else:
            remove(file)
    return outcome, report


def choose_passages(folder: Path, config: QueriesConfig) -> list[Document]:
    """The passages to ask about: drawn by their texts' hashes, a second one of a file after all first ones.

    Raises:
        NotFound, BadArgument: there is no collection, or it has other queries.
        BadInput: no passage is long enough.
    """
    if not (folder / CORPUS).is_file():
        raise NotFound(f"{folder} has no {CORPUS}; make one of your notes with `qe-edge data make`")
    if (folder / "queries.jsonl").exists() and not (folder / SYNTHETIC).is_file():
        raise BadArgument(f"{folder} has queries of its own, which would be lost; take a copy without them")
    places: dict[str, list[tuple[bytes, str]]] = {}
    for document in read_jsonl(folder / CORPUS, Document):
        if count_words(document.text) >= SHORTEST:
            drawn = _digest(f"{config.seed} {document.text}"), document.id
            places.setdefault(source_of(document.id), []).append(drawn)
    turns = ((turn, *drawn) for drawn_of in places.values() for turn, drawn in enumerate(sorted(drawn_of)))
    chosen = [document_id for _, _, document_id in heapq.nsmallest(config.passages, turns)]
    if not chosen:
        raise BadInput(f"has no passage of {SHORTEST} words or more", path=folder / CORPUS)
    wanted = set(chosen)
    texts = {row.id: row for row in read_jsonl(folder / CORPUS, Document) if row.id in wanted}
    return [texts[document_id] for document_id in chosen]


def source_of(document_id: str) -> str:
    """The document that a passage is of; the passage itself where its id names none."""
    return document_id.partition("#")[0]


def test_sources(documents: set[str], share: float, *, seed: int) -> set[str]:
    """The files whose queries are for testing: at least one, and not all where there are two."""
    sources = sorted(
        {source_of(document) for document in documents}, key=lambda name: _digest(f"{seed} {name}")
    )
    return set(sources[: min(max(1, round(share * len(sources))), max(1, len(sources) - 1))])


def clean_answer(text: str) -> str:
    """A query as it was meant: its first line, without quotation marks, list marks and labels around it."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if not lines:
        return ""
    line = _LABEL.sub("", lines[0])
    line = re.sub(r"^(\d+[.)]|[-*•])\s+", "", line)
    return line.strip(" \t*_`\"'“”‘’「」《》")


def near_duplicates(queries: dict[str, str]) -> list[str]:
    """Those that share NEAR_DUPLICATE of their index terms (Jaccard) with one that stands before them."""
    from scipy.sparse import csr_array

    names = list(queries)
    vocabulary: dict[str, int] = {}
    terms = []
    for text in queries.values():
        analyze = get_analyzer(analyzer_for(detect_language(text)))
        terms.append({vocabulary.setdefault(term, len(vocabulary)) for term in analyze(text)})
    sizes = np.array([len(found) for found in terms])
    starts = np.concatenate([[0], np.cumsum(sizes)])
    columns = np.array([column for found in terms for column in found], np.int64)
    shape = (len(names), max(1, len(vocabulary)))
    rows = csr_array((np.ones(len(columns), np.float32), columns, starts), shape=shape)
    shared = (rows @ rows.T).tocoo()
    out: set[int] = set()
    pairs = sorted(zip(shared.row.tolist(), shared.col.tolist(), shared.data.tolist(), strict=True))
    for later, earlier, common in pairs:
        either = sizes[later] + sizes[earlier] - common
        if earlier < later and earlier not in out and common >= NEAR_DUPLICATE * either:
            out.add(later)
    return [names[i] for i in sorted(out)]


def _found_again(
    folder: Path,
    written: dict[str, tuple[str, str]],
    config: QueriesConfig,
    workdir: Workdir,
    dropped: Counter[str],
) -> dict[str, tuple[str, str]]:
    """The queries by which BM25 or the reader finds their passage."""
    data = Dataset(folder.name, "", {}, {}, lambda: read_corpus(folder), folder)
    languages = Counter(detect_language(text) for text, _ in written.values())
    lang = languages.most_common(1)[0][0] if languages else "en"
    index = Index.for_dataset(data, workdir.root / "index", analyzer=analyzer_for(lang))
    missed: dict[str, tuple[str, str]] = {}
    kept: dict[str, tuple[str, str]] = {}
    for query_id, (text, document) in written.items():
        found = index.search_text(text, join=DEFAULT_JOIN, k=config.found_in)
        (kept if document in dict(found) else missed)[query_id] = text, document
    if config.reader and missed:
        model, threads = Path(config.reader), usable_cores()
        encoder = Encoder(model, threads=threads)
        dense = DenseIndex(encoder, sha256(model), data, index.ids, workdir.root / "vectors", threads=threads)
        with progress("searching again", len(missed)) as advance:
            for query_id, (text, document) in list(missed.items()):
                if document in dict(dense.search(text, k=config.found_in)):
                    kept[query_id] = missed.pop(query_id)
                advance()
        encoder.close()
    if missed:
        dropped["not found again"] += len(missed)
    return {query_id: kept[query_id] for query_id in written if query_id in kept}


def _digest(content: str | bytes) -> bytes:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).digest()
