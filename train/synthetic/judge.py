"""Grades from a teacher for what systems find, and how far they agree with judgments that people made."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from qe_edge.errors import BadArgument
from qe_edge.records import Document, Problem, read_jsonl
from qe_edge.retrieval.datasets import Dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import mean, per_query
from qe_edge.retrieval.official import QRELS_HEADER
from qe_edge.retrieval.prf import found_texts, read_texts, rm3
from qe_edge.retrieval.trec import Qrels, Run
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.train.synthetic.config import JudgeConfig
from qe_edge.train.synthetic.prompts import PassagePrompt, load_passage_prompt
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.session import Outcome, ask_all, check_done, open_teacher
from qe_edge.train.teach.teacher import Answer, Request
from qe_edge.work.files import write_bytes, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import check_place

JUDGMENTS, AGREEMENT = "judgments.jsonl", "agreement.json"
_FIRST = re.compile(
    r"\W*(?:(?:the\s+)?(?:grade|score)(?:\s+is)?|等级|分数)?\W*([0-3])(?!\.?\d)", re.IGNORECASE
)
_NAMED = re.compile(r"(?:grade|score|等级|分数)\D{0,8}([0-3])(?!\.?\d)", re.IGNORECASE)


class Judgment(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A teacher's grade of a document for a query, 0 to 3; none where its answer held none."""

    query_id: str
    document: str
    model: str
    prompt_id: str
    key: str
    grade: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    problem: Problem | None = None


class Agreement(msgspec.Struct, frozen=True):
    """How far the grades agree with those of people.

    So many `grades` there are; `pairs` were graded by both. Cohen's kappa is of grades 0 to 3, where people
    gave more than two, and of relevant or not: from 2 on, or from 1 where people gave 0 and 1 alone.
    Kendall's tau is that of the systems' order by nDCG@10 under either, over the queries that both judged.
    """

    grades: int
    pairs: int
    kappa: float | None
    kappa_binary: float | None
    tau: float | None
    systems: dict[str, tuple[float, float]]
    """Mean nDCG@10 by people's judgments and by these."""


class _Pair(NamedTuple):
    query_id: str
    document: str


class Pool:
    """The plan of a session: every pair once, whichever systems found it."""

    def __init__(
        self,
        data: Dataset,
        pairs: list[_Pair],
        texts: Mapping[str, str],
        config: JudgeConfig,
        prompt: PassagePrompt,
    ):
        self.data, self.pairs, self.texts, self.config, self.prompt = data, pairs, texts, config, prompt

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[_Pair]:
        return iter(self.pairs)

    def name(self, job: _Pair) -> str:
        return f"query {job.query_id}, document {job.document}"

    def request(self, job: _Pair) -> Request:
        document = Document(id=job.document, text=self.texts[job.document])
        system, user = self.prompt.messages(document, query=self.data.queries[job.query_id])
        config = self.config
        return Request(
            model=config.model,
            system=system,
            user=user,
            temperature=float(config.temperature),
            seed=config.seed,
            max_tokens=config.max_tokens,
            extra=config.extra,
        )

    def key(self, job: _Pair) -> str:
        content = msgspec.json.encode([*job, self.request(job)], order="deterministic")
        return hashlib.sha256(content).hexdigest()[:16]

    def row(self, job: _Pair, answer: Answer, *, keep_bad: bool) -> Judgment:
        grade = read_grade(answer.text)
        problem: Problem | None = None
        if grade is None:
            problem = "refused" if answer.finish_reason == "content_filter" else "unreadable"
        return Judgment(
            *job,
            model=self.config.model,
            prompt_id=self.prompt.id,
            key=self.key(job),
            grade=grade,
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            problem=problem,
        )


def judge(
    data: Dataset, runs: Mapping[str, Run], config: JudgeConfig, *, out: Path, workdir: Workdir
) -> tuple[Outcome, Agreement | None, Path]:
    """Grade the first documents of BM25, of RM3 and of `runs`; returns what was done, and the new judgments.

    They are in `out/SPLIT-synthetic.tsv`, which DATASET@FILE judges with. Every answer is kept beside it, so
    that the same call asks only for what is missing. Without an agreement, answers are missing and nothing
    but them was written.

    Raises:
        QeEdgeError: nothing could be got at all.
        BadArgument: `out` can't be written, or holds other files of these names.
    """
    check_place(out)
    file = out / f"{data.split or 'test'}-synthetic.tsv"
    if not (out / JUDGMENTS).exists():
        for own in (file, out / AGREEMENT):
            if own.exists():
                raise BadArgument(f"{own} is none that `qe-edge data judge` wrote; choose another folder")
    prompt = load_passage_prompt(config.prompt)
    teacher = open_teacher(config, max_tokens=config.max_tokens) if config.endpoint else None
    runs = {**_plain_runs(data, config.depth, workdir), **runs}
    pairs = pooled(data, runs, config.depth)
    texts = read_texts(data, {pair.document for pair in pairs})
    plan = Pool(data, pairs, texts, config, prompt)
    with Ledger(out / JUDGMENTS, Judgment, "data judge", "grades") as ledger:
        outcome, error = ask_all(plan, ledger, config, teacher, max_tokens=config.max_tokens)
    check_done(outcome, error)
    if outcome.done < outcome.candidates:
        return outcome, None, file
    answers = {row.key: row for row in read_jsonl(out / JUDGMENTS, Judgment)}
    graded: Qrels = {}
    for pair in plan:
        grade = answers[plan.key(pair)].grade
        if grade is not None:
            graded.setdefault(pair.query_id, {})[pair.document] = grade
    lines = [f"{q}\t{d}\t{grade}\n" for q, grades in graded.items() for d, grade in grades.items()]
    found = agreement(data.qrels, graded, runs)
    write_bytes(file, (QRELS_HEADER + "".join(lines)).encode())
    write_json(out / AGREEMENT, msgspec.to_builtins(found) | {"model": config.model, "prompt": config.prompt})
    return outcome, found, file


def pooled(data: Dataset, runs: Mapping[str, Run], depth: int) -> list[_Pair]:
    """Every query's first `depth` documents of all runs, each once."""
    return [
        _Pair(query_id, document)
        for query_id in data.queries
        for document in dict.fromkeys(
            doc for run in runs.values() for doc, _ in run.get(query_id, [])[:depth]
        )
    ]


def read_grade(answer: str) -> int | None:
    """The grade in an answer: what it begins with, or else the last one that it calls a grade."""
    if found := _FIRST.match(answer):
        return int(found[1])
    named = _NAMED.findall(answer)
    return int(named[-1]) if named else None


def agreement(people: Qrels, graded: Qrels, runs: Mapping[str, Run]) -> Agreement:
    """See `Agreement`."""
    from scipy.stats import kendalltau

    both = [
        (people[query_id][document], grade)
        for query_id, grades in graded.items()
        for document, grade in grades.items()
        if document in people.get(query_id, {})
    ]
    theirs, ours = (
        (np.array(column) for column in zip(*both, strict=True)) if both else (np.zeros(0), np.zeros(0))
    )
    relevant = 2 if any(grade > 1 for grades in people.values() for grade in grades.values()) else 1
    queries = [query_id for query_id in graded if people.get(query_id)]
    means: dict[str, tuple[float, float]] = {}
    for name, run in runs.items():
        by = [
            mean(per_query({query_id: qrels[query_id] for query_id in queries}, run)) if queries else 0.0
            for qrels in (people, graded)
        ]
        means[name] = by[0], by[1]
    tau = kendalltau(*zip(*means.values(), strict=True)).statistic if len(means) > 1 else float("nan")
    return Agreement(
        sum(map(len, graded.values())),
        len(both),
        cohens_kappa(theirs, ours) if relevant == 2 else None,
        cohens_kappa(theirs >= relevant, ours >= 2),
        None if np.isnan(tau) else float(tau),
        means,
    )


def cohens_kappa(one: np.ndarray, other: np.ndarray) -> float | None:
    """Agreement beyond chance (Cohen 1960); None where chance alone explains all, or there is nothing."""
    if not len(one):
        return None
    labels = np.union1d(one, other)
    observed = float(np.mean(one == other))
    by_chance = float(sum(np.mean(one == label) * np.mean(other == label) for label in labels))
    return None if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def _plain_runs(data: Dataset, depth: int, workdir: Workdir) -> dict[str, Run]:
    index = Index.for_dataset(data, workdir.root / "index")
    plain = {
        query_id: index.search_text(query, join=DEFAULT_JOIN, k=max(depth, 10))
        for query_id, query in data.queries.items()
    }
    return {"BM25": plain, "RM3": rm3(data, index, plain, found_texts(data, plain), max(depth, 10))}
