"""What a report says about one data set: the rows of all runs together, and a headline in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qe_edge.bench.result import BenchResult, DatasetResult, System
from qe_edge.bench.table import percent, rate, score, signed
from qe_edge.datasets import DatasetInfo
from qe_edge.measures import Interval


@dataclass(frozen=True)
class Row:
    """A system as measured in one run. `label` names the machine, `bm25` is the plain run beside it."""

    label: str
    system: System
    bm25: System | None

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
    rows: list[Row] = field(default_factory=list)

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self.rows if row.system.kind == kind]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(row.label for row in self.rows))

    @property
    def best(self) -> Row | None:
        """The most effective model; of equals, the faster one."""

        def rank(row: Row) -> tuple[float, float]:
            speed = row.system.speed
            return row.system.ndcg.mean, speed.decode_tokens_per_s if speed else 0.0

        return max(self.of_kind("model"), key=rank, default=None)


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
    return list(sections.values())


def _add_rows(section: Section, label: str, dataset: DatasetResult) -> None:
    bm25 = next((system for system in dataset.systems if system.kind == "bm25"), None)
    known = [(row.system.name, row.system.per_query) for row in section.rows]
    for system in dataset.systems:
        if system.kind == "model" or (system.name, system.per_query) not in known:
            section.rows.append(Row(label, system, bm25))


def headline(section: Section) -> str:
    """The section in a few plain sentences, no bolder than its intervals allow."""
    row = section.best or max(section.of_kind("teacher"), key=lambda row: row.system.ndcg.mean, default=None)
    if row is None:
        return "Only plain BM25 was measured here; there is nothing to compare it with."
    system, models = row.system, len(section.of_kind("model"))
    best_of = f" (the best of {models} models)" if section.best and models > 1 else ""
    subject = system.name if section.best else f"No model was run here. The teacher {system.name}"
    sentences = [
        f"{subject}{best_of} reaches {section.measure} {score(system.ndcg.mean)} on "
        f"{len(section.queries)} queries{_beside_bm25(row)}."
    ]
    if system.vs_bm25 is not None:
        sentences.append(verdict(system.vs_bm25, len(section.queries)))
    if section.best:
        sentences += [_beside_teacher(section, row), _speed(row)]
    return " ".join(filter(None, sentences))


def verdict(difference: Interval, queries: int) -> str:
    """What the interval of a difference to BM25 allows one to say."""
    figures = (
        f"The difference of {signed(difference.mean)} has a 95 % interval from "
        f"{signed(difference.low)} to {signed(difference.high)}"
    )
    if difference.low > 0:
        return f"{figures}: a gain that is more than chance."
    if difference.high < 0:
        return f"{figures}: a loss that is more than chance."
    return f"{figures}, which holds 0: {queries} queries cannot tell the two apart."


def _beside_bm25(row: Row) -> str:
    return "" if row.bm25 is None else f"; plain BM25 reaches {score(row.bm25.ndcg.mean)}"


def _beside_teacher(section: Section, row: Row) -> str:
    name = section.teachers.get(row.label)
    teacher = next((other.system for other in section.rows if other.system.name == name), None)
    if teacher is None or row.system.retention is None:
        return ""
    text = f"The teacher, {teacher.name}, reaches {score(teacher.ndcg.mean)}: the model keeps "
    text += f"{percent(row.system.retention.mean)} of that"
    gain = row.system.gain_retention
    return text + (f" and {percent(gain.mean)} of its gain over BM25." if gain else ".")


def _speed(row: Row) -> str:
    speed = row.system.speed
    if speed is None:
        return ""
    pace = f"{rate(speed.decode_tokens_per_s)} tokens/s, {rate(speed.ms_per_query_p50)} ms per query"
    return f"It writes {pace}, on {row.label}."
