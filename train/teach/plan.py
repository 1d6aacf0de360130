"""Which candidates a teacher is asked for, and what stands for each of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from qe_edge.errors import BadInput
from qe_edge.records import Expansion, Mode
from qe_edge.retrieval.datasets import Dataset
from qe_edge.student.prompt import PromptSpec, clean_query, load_teacher_prompt
from qe_edge.text import detect_language
from qe_edge.train.teach.config import TeachConfig
from qe_edge.train.teach.exemplars import Exemplars, load_exemplars
from qe_edge.train.teach.problems import problem_of
from qe_edge.train.teach.teacher import Answer, Request


class Job(NamedTuple):
    query_id: str
    mode: Mode
    sample: int


class Candidates:
    """The candidates a configuration stands for, in the order they are asked for.

    `own` is the prompt of a local student, for those of the mode `student`.

    Each query gets its first candidate before any gets its second, so that a budget that runs out leaves
    as many queries served as it can.
    """

    def __init__(self, data: Dataset, config: TeachConfig, own: PromptSpec | None = None):
        self.data, self.config, self.own = data, config, own
        self.prompt = load_teacher_prompt(config.prompt)
        self.exemplars: Exemplars | None = None
        if "few-shot" in config.modes:
            self.exemplars = load_exemplars(
                config.exemplars, data, rule=config.exemplar_rule, shots=config.shots, seed=config.seed
            )

    def __len__(self) -> int:
        return len(self.data.queries) * len(set(self.config.modes)) * self.config.n

    def __iter__(self) -> Iterator[Job]:
        for sample in range(self.config.n):
            for mode in dict.fromkeys(self.config.modes):
                for query_id in self.data.queries:
                    yield Job(query_id, mode, sample)

    def request(self, job: Job) -> Request:
        query, config = self.data.queries[job.query_id], self.config
        shown = self.exemplars.of(job.query_id, query) if job.mode == "few-shot" and self.exemplars else ()
        try:
            if job.mode == "student" and self.own:
                system, user = self.own.messages(clean_query(query))
            else:
                system, user = self.prompt.messages(query, shown)
        except BadInput as error:
            raise BadInput(f"query {job.query_id!r} of {self.data}: {error}") from None
        return Request(
            model=config.model,
            system=system,
            user=user,
            temperature=float(config.temperature),  # 1 and 1.0 must give one key
            seed=config.seed + job.sample,
            max_tokens=config.max_tokens,
            extra=config.extra,
        )

    def name(self, job: Job) -> str:
        return f"query {job.query_id} ({job.mode}, sample {job.sample})"

    def key(self, job: Job) -> str:
        """Stands for the query and all that decides its candidate, exemplars and prompt text included."""
        content = msgspec.json.encode([*job, self.request(job)], order="deterministic")
        return hashlib.sha256(content).hexdigest()[:16]

    def row(self, job: Job, answer: Answer, *, keep_bad: bool) -> Expansion:
        """An answer as a line of the output."""
        query, text = self.data.queries[job.query_id], answer.text.strip()
        problem = problem_of(query, text, answer.finish_reason)
        return Expansion(
            dataset=self.data.name,
            query_id=job.query_id,
            query=query,
            lang=detect_language(query),
            model=self.config.model,
            mode=job.mode,
            text=text if problem in (None, "cut") or keep_bad else "",
            prompt_id=self.own.id if job.mode == "student" and self.own else self.prompt.id,
            seed=self.config.seed + job.sample,
            temperature=self.config.temperature,
            finish_reason="length" if answer.finish_reason == "length" else "stop",
            prompt_tokens=answer.prompt_tokens,
            completion_tokens=answer.completion_tokens,
            sample=job.sample,
            key=self.key(job),
            problem=problem,
        )
