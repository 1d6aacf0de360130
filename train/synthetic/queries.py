"""Queries for a collection that has none: a teacher writes what a passage answers, retrieval checks it."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from qe_edge.documents.folder import CORPUS
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.records import Document, Problem, Query, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import SYNTHETIC
from qe_edge.retrieval.official import QRELS_HEADER
from qe_edge.student.hub import local_file
from qe_edge.text import count_words
from qe_edge.train.synthetic.config import QueriesConfig
from qe_edge.train.synthetic.filters import KnownItem, clean_answer, distinct, fault_of, found_again
from qe_edge.train.synthetic.prompts import PassagePrompt, load_passage_prompt
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.problems import problem_of
from qe_edge.train.teach.session import Outcome, ask_all, check_done, open_teacher
from qe_edge.train.teach.teacher import Answer, Request
from qe_edge.work.files import remove, write_bytes, write_json
from qe_edge.work.folder import Workdir

ASKED = "queries-asked.jsonl"
SHORTEST = 15  # words of a passage that can answer anything


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
    written: dict[str, KnownItem] = {}  # by its id: passages with the same text have the same answer
    for job in plan:
        row = answers[plan.key(job)]
        if fault := row.problem or fault_of(row.text):
            dropped[fault] += 1
        else:
            query_id = f"q-{row.key}"
            written[query_id] = KnownItem(query_id, row.text, job.document.id)
    reader = local_file(config.reader) if config.reader else None
    found = found_again(folder, list(written.values()), first=config.found_in, reader=reader, workdir=workdir)
    kept = distinct(found)
    dropped["not found again"] += len(written) - len(found)
    dropped["like another one"] += len(found) - len(kept)
    dropped = +dropped
    if not kept:
        what = ", ".join(f"{count} {why}" for why, count in dropped.items())
        raise BadInput(f"no query is left of {len(plan)}: {what}; take another model", path=folder / ASKED)
    test = test_sources({item.document for item in kept}, config.test_share, seed=config.seed)
    splits: dict[str, list[KnownItem]] = {"train": [], "test": []}
    for item in kept:
        splits["test" if source_of(item.document) in test else "train"].append(item)
    report = Report(len(splits["train"]), len(splits["test"]), dict(dropped))
    # What says that they are synthetic comes first: no moment may show them as others.
    about = {"model": config.model, "prompt": config.prompt, **msgspec.to_builtins(report)}
    write_json(folder / SYNTHETIC, about)
    _write_judged(folder, splits)
    return outcome, report


def choose_passages(folder: Path, config: QueriesConfig) -> list[Document]:
    """The passages to ask about: drawn by their texts' hashes, a second one of a file after all first ones.

    Raises:
        NotFound, BadArgument: there is no collection, or it has other queries.
        BadInput: no passage is long enough.
    """
    if not (folder / CORPUS).is_file():
        raise NotFound(f"{folder} has no {CORPUS}; make one of your notes with `qe-edge data make`")
    if not (folder / SYNTHETIC).is_file():
        for own in ("queries.jsonl", "qrels/train.tsv", "qrels/test.tsv"):
            if (folder / own).exists():
                raise BadArgument(
                    f"{folder} has {own} of its own, which would be lost; take a copy without it"
                )
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


def _write_judged(folder: Path, splits: dict[str, list[KnownItem]]) -> None:
    """A split is there when it is whole: killed before, the folder lacks it, and says so."""
    files = {split: folder / "qrels" / f"{split}.tsv" for split in splits}
    for file in files.values():
        remove(file)
    queries = [Query(id=item.query_id, text=item.text) for items in splits.values() for item in items]
    write_bytes(folder / "queries.jsonl", encode_jsonl(queries))
    for split, items in splits.items():
        if items:
            lines = [f"{item.query_id}\t{item.document}\t1\n" for item in items]
            write_bytes(files[split], (QRELS_HEADER + "".join(lines)).encode())


def _digest(content: str | bytes) -> bytes:
    return hashlib.sha256(content if isinstance(content, bytes) else content.encode()).digest()
