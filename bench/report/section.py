"""What a report says about one data set: the rows of all runs together, and a headline in plain words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import get_args

from qe_edge.bench.report.figures import ALPHA, percent, rate, score, signed
from qe_edge.bench.result import BenchResult, DatasetResult, Kind, System
from qe_edge.retrieval.datasets import DatasetInfo
from qe_edge.retrieval.measures import Interval


@dataclass(frozen=True)
class Measurement:
    """A system as measured in one run. `label` names the machine, `bm25` is the plain run beside it."""

    label: str
    system: System
    bm25: System | None

    @property
    def tokens_per_s(self) -> float:
        """The decode speed; 0 where none is known."""
        return (self.system.speed.decode_tokens_per_s or 0.0) if self.system.speed else 0.0

    def gains(self) -> dict[str, float]:
        """Each query's difference to plain BM25, best first."""
        if self.bm25 is None:
            return {}
        base, own = self.bm25.per_query, self.system.per_query
        return dict(sorted(((q, own[q] - base[q]) for q in own if q in base), key=lambda item: -item[1]))


@dataclass
class Section:
    """One data set under one measure, as seen by one or several runs."""

    info: DatasetInfo
    fingerprint: str
    measure: str
    queries: dict[str, str]
    teachers: dict[str, str | None] = field(default_factory=dict)
    rows: list[Measurement] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Measurement]:
        return [row for row in self.rows if row.system.kind == kind]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def drawn(self) -> list[Measurement]:
        """The models with a speed, each with its best join: others would lie on the same spot."""
        rows = sorted(self.of_kind("model"), key=lambda row: row.system.ndcg.mean)
        return list({(row.label, row.system.name): row for row in rows if row.tokens_per_s}.values())

    @property
    def has_joins(self) -> bool:
        """Whether a model that writes has several rows."""
        return len(self.drawn) < sum(row.tokens_per_s > 0 for row in self.of_kind("model"))

    @property
    def references(self) -> list[Measurement]:
        """What has no speed of writing: BM25 with and without feedback, other systems, and the teachers.

        Encoders with each model's and teacher's texts are in the table alone: they would fill the chart.
        """
        others = [
            row for row in self.of_kind("run") if not (row.system.encoding and " + " in row.system.name)
        ]
        reading = [row for _, row in self.distinct_models() if row.system.speed and not row.tokens_per_s]
        return self.of_kind("bm25") + self.of_kind("feedback") + others + reading + self.of_kind("teacher")

    @property
    def has_budgets(self) -> bool:
        """Whether a model's effectiveness is known at several token budgets."""
        return any(row.system.budgets for row in self.of_kind("model"))

    def title(self, row: Measurement) -> str:
        """A system's name, with its join where it was measured with several."""
        joins = {other.system.join for other in self.rows if other.system.name == row.system.name}
        return f"{row.system.name} ({row.system.join})" if len(joins) > 1 else row.system.name

    def machine(self, row: Measurement) -> str:
        """The machine of a model where there are several; what the others achieve is the same on all."""
        return row.label if row.system.kind == "model" and len(self.labels) > 1 else ""

    def name(self, row: Measurement) -> str:
        """What tells a row from all others."""
        return ", ".join(filter(None, [self.title(row), self.machine(row)]))

    def distinct_models(self) -> list[tuple[str, Measurement]]:
        """Models with a name, without those that did the same on another machine, as most do."""
        rows: list[Measurement] = []
        for row in self.of_kind("model"):
            same = (other for other in rows if self.title(other) == self.title(row))
            if all(other.system.per_query != row.system.per_query for other in same):
                rows.append(row)
        often = Counter(map(self.title, rows))
        return [(self.title(row) if often[self.title(row)] == 1 else self.name(row), row) for row in rows]

    def joins(self) -> dict[str, list[str]]:
        """Join -> the systems that were measured with it."""
        found: dict[str, list[str]] = {}
        for row in self.of_kind("model") + self.of_kind("teacher"):
            names = found.setdefault(row.system.join, [])
            if row.system.name not in names:
                names.append(row.system.name)
        return found

    @property
    def best(self) -> Measurement | None:
        """The most effective model; of equals, the faster one."""
        models = self.of_kind("model")
        return max(models, key=lambda row: (row.system.ndcg.mean, row.tokens_per_s), default=None)


def merge(results: Sequence[BenchResult]) -> list[Section]:
    """Put what was measured on the same collection together, in the order of the files.

    Same name but other documents, judgments or measure means other numbers: those stay apart.
    BM25 and ready-made teachers do not depend on the machine and are shown once.
    """
    sections: dict[tuple[str, str, str], Section] = {}
    for result in results:
        for dataset in result.datasets:
            key = (dataset.info.name, dataset.fingerprint, dataset.measure)
            section = sections.setdefault(key, Section(dataset.info, *key[1:], dataset.queries))
            section.teachers[result.label] = dataset.teacher
            _add_rows(section, result.label, dataset)
    for section in sections.values():
        section.rows = [row for kind in get_args(Kind) for row in section.of_kind(kind)]
    return list(sections.values())


def _add_rows(section: Section, label: str, dataset: DatasetResult) -> None:
    bm25 = next((system for system in dataset.systems if system.kind == "bm25"), None)
    known = [(row.system.name, row.system.per_query) for row in section.rows]
    for system in dataset.systems:
        if system.kind == "model" or (system.name, system.per_query) not in known:
            section.rows.append(Measurement(label, system, bm25))


def headline(section: Section) -> str:
    """The section in a few plain sentences, no bolder than its intervals allow."""
    row = section.best or max(section.of_kind("teacher"), key=lambda row: row.system.ndcg.mean, default=None)
    if row is None:
        return "Neither a model nor a teacher was measured here, only what BM25 does by itself."
    system, rivals = row.system, len({section.title(other) for other in section.of_kind("model")})
    best_of = f", the best of {rivals} rows of models," if rivals > 1 else ""
    subject = section.title(row) if section.best else f"No model was run here. The teacher {system.name}"
    sentences = [
        f"{subject}{best_of} reaches {section.measure} {score(system.ndcg.mean)} on "
        f"{len(section.queries)} queries{_beside_bm25(row)}."
    ]
    if system.vs_bm25 is not None:
        sentences.append(verdict(system.vs_bm25, len(section.queries), system.p_vs_bm25))
    if section.best:
        sentences += [_beside_teacher(section, row), _speed(row)]
    return " ".join(filter(None, sentences)).replace(" %", "\u00a0%")


def verdict(difference: Interval, queries: int, p: float | None) -> str:
    """What a difference to BM25 allows one to say, by its interval and by its test.

    `p` is corrected for all systems that were compared; None where there was no test.
    """
    figures = (
        f"The difference of {signed(difference.mean)} has a 95 % interval from "
        f"{signed(difference.low)} to {signed(difference.high)}"
    )
    if difference.low == difference.high:
        return f"{figures}, which says nothing: the queries do not vary."
    if difference.low > 0 or difference.high < 0:
        if p is not None and p >= ALPHA:
            return f"{figures}. Among all systems that were compared it may be chance (p {score(p)})."
        what = "gain" if difference.low > 0 else "loss"
        return f"{figures}: the {what} is unlikely to be chance."
    return f"{figures}, which includes 0: {queries} queries cannot tell the two apart."


def _beside_bm25(row: Measurement) -> str:
    return "" if row.bm25 is None else f"; plain BM25 reaches {score(row.bm25.ndcg.mean)}"


def _beside_teacher(section: Section, row: Measurement) -> str:
    name = section.teachers.get(row.label)
    teacher = next((other.system for other in section.rows if other.system.name == name), None)
    if teacher is None or row.system.retention is None:
        return ""
    reached = f"{teacher.name}, the teacher, reaches {score(teacher.ndcg.mean)}"
    if row.bm25 and row.system.ndcg.mean <= row.bm25.ndcg.mean:
        return f"{reached}. The model doesn't pass plain BM25."
    if row.bm25 and teacher.ndcg.mean <= row.bm25.ndcg.mean:
        return f"{reached}. It doesn't pass plain BM25, so it is no yardstick here."
    text = f"{reached}; the model has "
    text += f"{percent(row.system.retention.mean)} of that"
    gain = row.system.gain_retention
    return text + (f" and {percent(gain.mean)} of its gain over BM25." if gain and gain.mean > 0 else ".")


def _speed(row: Measurement) -> str:
    speed = row.system.speed
    if speed is None:
        return ""
    took = f"{rate(speed.ms_per_query_p50)} ms per query, on {row.label}."
    if speed.decode_tokens_per_s is not None:
        return f"The model writes {rate(speed.decode_tokens_per_s)} tokens/s, {took}"
    if speed.prefill_tokens_per_s is not None:
        return f"The model reads {rate(speed.prefill_tokens_per_s)} tokens/s, {took}"
    return f"It takes {took}"
