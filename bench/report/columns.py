"""The columns of a bench's tables, and the notes below them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from qe_edge.bench.inputs import parse_run
from qe_edge.bench.report.figures import (
    ALPHA,
    MISSING,
    caveat,
    percent,
    rate,
    score,
    signed,
    significance,
    with_interval,
)
from qe_edge.bench.result import BUSY, BenchResult, DatasetResult, System
from qe_edge.bench.speed import BUDGETS
from qe_edge.errors import BadArgument
from qe_edge.retrieval.measures import Interval


class Column(NamedTuple):
    """A column by its `key`; a title's lines are broken for narrow tables."""

    key: str
    title: str
    cell: Callable[[System], str]
    justify: Literal["left", "right"] = "right"


NAME = Column("system", "system", lambda s: s.name, "left")
KEYS = ("join", "ndcg", "vs-bm25", "of-teacher", "of-gain", "helped", "speed", "ms", "file", "memory")
NARROW = ("ndcg", "vs-bm25", "of-teacher", "speed", "ms")  # with a name, 80 characters

# What is beside BM25 without a student, by how its row begins, or ends behind the texts of another.
BASELINES = {
    "dense": "all documents are ranked by an encoder's vectors",
    "rerank": "an encoder orders what BM25 finds first",
    "hybrid": "BM25's ranks and the encoder's are added up",
}
# What a student's row ends with where it is used in more ways than to write.
WAYS = {
    "gate": "the student's text where its gate lets it pass, else the query alone",
    "refine": "a text is written, what it finds is read, and both expand the query",
    "feedback": "what the plain query finds is read; nothing is written",
}
JOINS = {
    "mass": "mass:R weighs an expansion R times as much as its query",
    "repeat": "repeat:N counts the query's words N times, the expansion's once",
    "adaptive": "adaptive:B repeats the query by the expansion's length over B",
}


def ways(systems: Iterable[System]) -> list[str]:
    """What the rows are, but for the plain BM25 and what a model is named."""
    rows: dict[str, list[str]] = {}
    for system in systems:
        rows.setdefault(system.kind, []).append(system.name)
    lines = [f"{name}: the query with words of what BM25 finds first." for name in rows.get("feedback", [])]
    lines += [f"{', '.join(rows['teacher'])}: the teacher's texts."] if "teacher" in rows else []
    for kind, what in BASELINES.items():
        if any(f" + {kind} " in f" + {name}" for name in rows.get("run", [])):
            lines.append(f"{kind}: {what}.")
    return lines + [
        f"+ {way}: {what}."
        for way, what in WAYS.items()
        if any(f" + {way}" in name for name in rows.get("model", []))
    ]


def _share(interval: Interval | None) -> str:
    return MISSING if interval is None else percent(interval.mean)


def _speed(attribute: str, system: System) -> str:
    value = getattr(system.speed, attribute, None)
    return MISSING if value is None else rate(value)


def _mean(values: str, key: str | int, system: System) -> str:
    found = getattr(system, values).get(key)
    return MISSING if found is None else score(found.mean)


def all_columns(dataset: DatasetResult) -> list[Column]:
    """What can be shown of a data set."""
    return [
        Column("join", "join", lambda s: s.join or MISSING, "left"),
        Column("ndcg", dataset.measure, lambda s: with_interval(s.ndcg, score)),
        Column("vs-bm25", "vs BM25", lambda s: with_interval(s.vs_bm25, signed) + significance(s)),
        Column("of-teacher", "of\nteacher", lambda s: _share(s.retention)),
        Column("of-gain", "of its\ngain", lambda s: _share(s.gain_retention)),
        Column("helped", "helped/hurt", lambda s: MISSING if s.kind == "bm25" else f"{s.helped}/{s.hurt}"),
        Column("speed", "tok/s", partial(_speed, "decode_tokens_per_s")),
        Column("ms", "ms/query", partial(_speed, "ms_per_query_p50")),
        Column("file", "MB\nfile", partial(_speed, "file_mb")),
        Column("memory", "MB\nmem", partial(_speed, "peak_memory_mb")),
        *added(dataset),
    ]


def added(dataset: DatasetResult) -> list[Column]:
    """Other measures and token budgets, where there are any."""
    measures = dict.fromkeys(name for system in dataset.systems for name in system.measures)
    budgets = sorted({budget for system in dataset.systems for budget in system.budgets})
    return [
        *(Column(name, name, partial(_mean, "measures", name)) for name in measures),
        *(Column(f"{n}-tokens", f"{n}\ntokens", partial(_mean, "budgets", n)) for n in budgets),
    ]


def chosen(dataset: DatasetResult, keys: Sequence[str]) -> list[Column]:
    """Columns by their keys.

    Raises:
        BadArgument: there is no such column.
    """
    known = {column.key: column for column in all_columns(dataset)}
    check_columns(keys, [name for system in dataset.systems for name in system.measures])
    return [known.get(key) or Column(key, key.replace("-", " "), lambda _: MISSING) for key in keys]


def check_columns(keys: Sequence[str], measures: Sequence[str]) -> None:
    """Refuse what no table of these measures has, before anything is measured.

    Raises:
        BadArgument: there is no such column.
    """
    known = [*KEYS, *dict.fromkeys(measures), *(f"{budget}-tokens" for budget in BUDGETS)]
    for key in keys:
        if key not in known:
            raise BadArgument(f"no column {key!r}; there are: {', '.join(known)}")


def narrow(dataset: DatasetResult) -> list[Column]:
    """The columns that most ask for: the join where it tells rows apart, teacher and times where they are."""
    names = {(system.name, system.join) for system in dataset.systems}
    keys = ["join"] if len({name for name, _ in names}) < len(names) else []
    shares = any(system.retention for system in dataset.systems) and not no_yardstick(dataset)
    empty = set() if shares else {"of-teacher"}
    if not any(system.speed for system in dataset.systems):
        empty |= {"speed", "ms"}
    return chosen(dataset, [*keys, *(key for key in NARROW if key not in empty)])


def no_yardstick(dataset: DatasetResult) -> str:
    """That the teacher is none, where it doesn't pass BM25."""
    means = {system.name: system.ndcg.mean for system in dataset.systems}
    best = means.get(dataset.teacher or "")
    if best is None or best > means.get("BM25", 0):
        return ""
    return f"{dataset.teacher} doesn't pass plain BM25, so it is no yardstick here."


def load_note(run: BenchResult) -> str:
    """That a machine had other work, where it had much."""
    load = run.machine.get("busy", 0)
    if load <= BUSY:
        return ""
    return f"Other work took {100 * load:.0f} % of the processors at the start: the times say little."


def reuse_note(systems: Iterable[System]) -> str:
    """Whose times are not of this run."""
    names = dict.fromkeys(system.name for system in systems if system.speed and system.speed.reused)
    told = "Times measured in an earlier run, at least in part, and under its load: "
    return f"{told}{', '.join(names)}." if names else ""


def notes(dataset: DatasetResult, columns: Sequence[Column], run: BenchResult | None = None) -> list[str]:
    """What a reader of a table must know: its size, its teacher, its failures, and what its columns say.

    With the `run` that it is of, also whether other work made its times long.
    """
    keys = {column.key for column in columns}
    hint = ": see the interval of “vs BM25”" if "vs-bm25" in keys else ""
    lines = [caveat(dataset.info.name, len(dataset.queries), hint=hint)]
    timed = keys & {"speed", "ms"} and any(system.speed for system in dataset.systems)
    if run and timed and (told := load_note(run)):
        lines.append(told)
    if timed and (told := reuse_note(dataset.systems)):
        lines.append(told)
    if "vs-bm25" in keys and any((system.p_vs_bm25 or 1) < ALPHA for system in dataset.systems):
        others = len(dataset.systems) - 1
        corrected = f", corrected by Holm over {others} systems" if others > 1 else ""
        lines.append(f"* p < {score(ALPHA).rstrip('0')} against BM25: paired randomization test{corrected}.")
    lines += ways(dataset.systems)
    times = {"speed": "tok/s: tokens written a second.", "ms": "ms/query: the median time to expand a query."}
    if told := " ".join(text for key, text in times.items() if key in keys):
        lines.append(told)
    if any(key.endswith("-tokens") for key in keys):
        longest = max((budget for system in dataset.systems for budget in system.budgets), default=0)
        later = [key for key in keys if key.endswith("-tokens") and int(key.partition("-")[0]) > longest]
        more = f" {MISSING}: none is longer, or it wasn't cut." if later else ""
        lines.append(f"N tokens: {dataset.measure} when each expansion ends after so many.{more}")
    if dataset.teacher is None and keys & {"of-teacher", "of-gain"}:
        lines.append("No teacher was measured to compare with: --teacher names a file of its texts.")
    if told := no_yardstick(dataset):
        lines.append(told)
    teacher = dataset.teacher or "a teacher"
    if "of-teacher" in keys:
        why = "BM25, and the teacher itself"
        compared = [s for s in dataset.systems if s.kind != "bm25" and s.name != dataset.teacher]
        if compared and not any(system.retention for system in compared):
            why = "on so few queries, the teacher's figure can't be told from zero"
        itself = f" ({MISSING}: {why})." if dataset.teacher else "."
        shared = f"of teacher: {dataset.measure} as a share of that of {teacher}"
        lines.append(shared + itself)
    if "of-gain" in keys:
        none = dataset.teacher and all(system.gain_retention is None for system in dataset.systems)
        lines.append(
            f"of its gain: of what {teacher} gains over BM25, the share that is gained too"
            + (f". {MISSING}: it gains nothing, or nothing that can be told from chance." if none else ".")
        )
    if "helped" in keys:
        lines.append(f"helped/hurt: queries whose {dataset.measure} is above, or below, BM25's.")
    if "file" in keys:
        lines.append("MB file: the size of the model's file.")
    if "memory" in keys:
        lines.append("MB mem: the most memory of the process that ran the model.")
    if more_measures := sorted(key for key in keys if any(key in s.measures for s in dataset.systems)):
        lines.append(f"{', '.join(more_measures)}: as ir-measures names measures.")
    if "join" not in keys:
        joined: dict[str, list[str]] = {}
        for system in dataset.systems:
            joined.setdefault(system.join, []).append(system.name)
        for join in filter(None, joined):
            both = ", the first what is written and the second what is read" if " + " in join else ""
            lines.append(f"Joined by {join}{both}: {', '.join(joined[join])}.")
    rules = [text for rule, text in JOINS.items() if any(f"{rule}:" in s.join for s in dataset.systems)]
    if rules:
        lines.append(f"{'; '.join(rules)}.")
    lines += dict.fromkeys(
        f"Encoding {dataset.info.documents:,} documents took {once.seconds:.0f} s on {once.threads} threads, "
        f"for {rate(once.megabytes)} MB of vectors: all rows with dense or hybrid need it first."
        for system in dataset.systems
        if (once := system.encoding)
    )
    lines += [
        f"{system.name}: queries without an expansion, searched as they are: {system.failed}."
        for system in dataset.systems
        if system.failed
    ]
    runs = run.settings.get("run", ()) if run else ()
    known = {system.name for system in dataset.systems if system.kind == "run"}
    lines += [f"{label}: the ranking in {file}." for label, file in map(parse_run, runs) if label in known]
    return [*lines, *(f"{warning}." for warning in dataset.warnings)]
