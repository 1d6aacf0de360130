"""Bench results as one HTML page that opens offline, and as an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from importlib import resources
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from qe_edge.bench.report import charts
from qe_edge.bench.report.columns import load_note, no_yardstick, reuse_note, ways
from qe_edge.bench.report.figures import MISSING, bounds, caveat, percent, rate, score, signed
from qe_edge.bench.report.section import Measurement, Section, headline, merge
from qe_edge.bench.result import BenchResult, System, read_result
from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.retrieval.measures import Interval
from qe_edge.work.files import write_bytes

_EXAMPLES = 10
_PNG_WIDTH = 640
# What the columns of the page's tables are, where their titles don't say it.
_EXPLAINED = {
    "vs BM25": "the difference to plain BM25, query by query",
    "p (Holm)": "of a two-sided paired randomization test against BM25, corrected by Holm over the run",
    "vs teacher": "the difference to the teacher, query by query",
    "Of teacher": "a model's figure as a share of the teacher's",
    "Of its gain": "the share of the teacher's gain over BM25",
    "Helped": "queries that it raises above BM25",
    "Hurt": "queries that it lowers below BM25",
    "Failed": "queries without an expansion, searched as they are",
    "Tokens/s": "tokens written a second",
    "ms/query": "the median time to expand a query",
    "Prompt tokens/s": "tokens read a second (prefill)",
    "Decode tokens/s": "tokens written a second",
    "Tokens/query": "those of a text, on average",
    "First token ms": "the median time until it is there",
    "ms/query p50": "the median time to expand a query",
    "ms/query p95": "what 95 of 100 queries stay below",
    "Load s": "the time to load the model",
    "MB file": "the size of the model's file",
    "MB memory": "the most memory of the process that ran the model",
    "J/query": "the energy of an expansion",
}
# What a machine's entries are called, where their keys don't say it.
_MACHINE = {
    "cpu": "Processor",
    "gpu": "GPU",
    "memory_gb": "Memory, GB",
    "busy": "Processors at other work",
}


def report(results: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about one or several bench runs.

    Args:
        results: result files, or folders of bench runs; runs on the same data set share a section.
        out: the HTML file to write.

    Raises:
        BadInput: a file is not a bench result.
        NotInstalled: the `report` extra is missing.
    """
    if not results:
        raise BadArgument("name at least one bench result to report on")
    runs = [read_result(path) for path in results]
    write_bytes(out, _render(runs).encode())
    return out


def chart_png(result: BenchResult, out: Path) -> Path:
    """Draw effectiveness against speed as a PNG, one plot for each data set that a model was timed on."""
    alt = require("altair", "report")
    vl_convert = require("vl_convert", "report")
    sections = [section for section in merge([result]) if section.drawn]
    if not sections:
        raise BadInput(
            "no model was timed in the first result, so there is nothing to draw; name another one first, "
            "or leave --png out"
        )
    plots = [
        charts.pareto(section, charts.light_paint, _PNG_WIDTH).properties(
            title=alt.Title(section.info.name, subtitle=f"{len(section.queries)} queries, {result.label}")
        )
        for section in sections
    ]
    spec = reduce(alt.vconcat, plots).to_dict()
    spec["config"] = charts.config(charts.light_paint, background="white")
    write_bytes(out, vl_convert.vegalite_to_png(spec, scale=2))
    return out


def _render(runs: Sequence[BenchResult]) -> str:
    jinja2 = require("jinja2", "report")
    vl_convert = require("vl_convert", "report")
    folder = resources.files("qe_edge.bench.report") / "templates"
    template = (folder / "report.html").read_text(encoding="utf-8")
    # Queries and expansions are foreign text: escaped everywhere; inside scripts `tojson` writes < as \u003c.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        runs=runs,
        views=[_view(section, runs) for section in merge(runs)],
        colours=charts.COLOURS,
        font=charts.FONT,
        config=charts.config(charts.css_paint),
        resamples=runs[0].resamples,
        machine=_MACHINE,
        vega=vl_convert.javascript_bundle(),
    )


def _view(section: Section, runs: Sequence[BenchResult]) -> dict[str, Any]:
    """All that the template shows of a section."""
    paint, best = charts.css_paint, section.best
    seen = [(run, data) for run in runs for data in run.datasets if data.fingerprint == section.fingerprint]
    told = {
        f"{run.label}: {warning}"
        for run, data in seen
        for warning in [
            no_yardstick(data),
            load_note(run) if section.drawn else "",
            reuse_note(data.systems),
            *(f"{text}." for text in data.warnings),
        ]
        if warning
    }
    return {
        "section": section,
        "headline": headline(section),
        "caveat": caveat(section.info.name, len(section.queries), hint=": see the interval of “vs BM25”"),
        "told": [*sorted(told), *ways(row.system for row in section.rows)],
        "pareto": charts.pareto(section, paint, "container").to_dict() if section.drawn else None,
        "by_budget": charts.by_budget(section, paint, "container").to_dict() if section.has_budgets else None,
        "per_query": [
            (title, charts.per_query(section, row, paint).to_dict())
            for title, row in section.distinct_models()
            if row.bm25
        ],
        "tables": [
            _quality(section, shares=not all(no_yardstick(data) for _, data in seen)),
            *([_speed(section)] if section.drawn else []),
        ],
        "best": best and section.name(best),
        "examples": _examples(section, best) if best else {},
    }


class _Example(NamedTuple):
    """A query that an expansion helped or hurt."""

    query: str
    plain: str
    expanded: str
    gain: str
    expansion: str


def _examples(section: Section, row: Measurement) -> dict[str, list[_Example]]:
    gains = list(row.gains().items())
    helped = [item for item in gains if item[1] > 0][:_EXAMPLES]
    hurt = [item for item in reversed(gains) if item[1] < 0][:_EXAMPLES]

    def example(query_id: str, gain: float) -> _Example:
        value = row.system.per_query[query_id]
        query, expansion = section.queries.get(query_id, query_id), row.system.expansions.get(query_id, "")
        return _Example(query, score(value - gain), score(value), signed(gain), expansion)

    return {
        "Most helped": [example(*item) for item in helped],
        "Most hurt": [example(*item) for item in hurt],
    }


class _Cell(NamedTuple):
    """What a table shows, and what it sorts by; None sorts last."""

    text: str
    value: float | str | None
    detail: str = ""


class _Table(NamedTuple):
    caption: str
    titles: list[str]
    rows: list[list[_Cell]]

    @property
    def explained(self) -> str:
        """What its columns are."""
        return " ".join(f"{title}: {_EXPLAINED[title]}." for title in self.titles if title in _EXPLAINED)


def _quality(section: Section, *, shares: bool) -> _Table:
    """What each system gains, and the cost figures that most people ask for; no columns of dashes.

    Without `shares` of the teacher's figure, where that is no yardstick.
    """
    titles = [
        "System",
        section.measure,
        "vs BM25",
        "p (Holm)",
        "vs teacher",
        "Of teacher",
        "Of its gain",
        "Helped",
        "Hurt",
    ]
    titles += ["Failed", "Tokens/s", "ms/query", "MB file", "MB memory"]
    measures = list(dict.fromkeys(name for row in section.rows for name in row.system.measures))
    titles += measures
    rows = [
        _quality_row(section, row) + [_interval(row.system.measures.get(name), score) for name in measures]
        for row in section.rows
    ]
    known = [any(row[column].value is not None for row in rows) for column in range(len(titles))]
    known[titles.index("Of teacher")] &= shares
    return _Table(
        "Effectiveness and cost", list(compress(titles, known)), [list(compress(row, known)) for row in rows]
    )


def _quality_row(section: Section, row: Measurement) -> list[_Cell]:
    system, plain = row.system, row.system.kind == "bm25"
    counts = (system.helped, system.hurt, system.failed)
    return [
        _Cell(section.title(row), section.name(row), section.machine(row)),
        _interval(system.ndcg, score),
        _interval(system.vs_bm25, signed),
        _number(system.p_vs_bm25, score),
        _interval(system.vs_teacher, signed),
        _interval(system.retention, percent),
        _interval(system.gain_retention, percent),
        *(_number(None if plain else count, str) for count in counts),
        *_figures(system, "decode_tokens_per_s", "ms_per_query_p50", "file_mb", "peak_memory_mb"),
    ]


def _speed(section: Section) -> _Table:
    """Everything that was timed, and the file that it belongs to."""
    figures = {
        "prefill_tokens_per_s": "Prompt tokens/s",
        "decode_tokens_per_s": "Decode tokens/s",
        "mean_tokens": "Tokens/query",
        "first_token_ms_p50": "First token ms",
        "ms_per_query_p50": "ms/query p50",
        "ms_per_query_p95": "ms/query p95",
        "load_s": "Load s",
        "file_mb": "MB file",
        "peak_memory_mb": "MB memory",
        "joules_per_query": "J/query",
    }
    speeds = [row.system.speed for row in section.of_kind("model") if row.system.speed]
    figures = {
        name: title for name, title in figures.items() if any(getattr(s, name) is not None for s in speeds)
    }
    rows = [
        [
            _Cell(section.title(row), section.name(row), section.machine(row)),
            *_figures(row.system, *figures),
            _number(speed.threads, str),
            _text(speed.engine),
            _text((row.system.sha256 or MISSING)[:12]),
        ]
        for row in section.of_kind("model")
        if (speed := row.system.speed)
    ]
    return _Table("Speed in detail", ["System", *figures.values(), "Threads", "Engine", "SHA-256"], rows)


def _text(text: str) -> _Cell:
    return _Cell(text, text)


def _number(value: float | None, write: Callable[[Any], str]) -> _Cell:
    return _Cell(MISSING if value is None else write(value), value)


def _interval(interval: Interval | None, write: Callable[[float], str]) -> _Cell:
    if interval is None:
        return _Cell(MISSING, None)
    return _Cell(write(interval.mean), interval.mean, bounds(interval, write))


def _figures(system: System, *names: str) -> list[_Cell]:
    return [_number(getattr(system.speed, name) if system.speed else None, rate) for name in names]
