"""Bench results as one HTML page that opens offline, and as an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from qe_edge.bench import charts
from qe_edge.bench.result import BenchResult, System, read_result
from qe_edge.bench.section import Row, Section, headline, merge
from qe_edge.bench.table import MISSING, caveat, percent, rate, score, signed, with_interval
from qe_edge.errors import BadArgument, BadInput, require
from qe_edge.manifest import write_bytes
from qe_edge.measures import RESAMPLES, Interval

_EXAMPLES = 5
_PNG_WIDTH = 640


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
    sections = [section for section in merge([result]) if section.timed]
    if not sections:
        raise BadInput("no model's speed is in this bench result, so there is nothing to draw")
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


class _Cell(NamedTuple):
    """What a table shows, and what it sorts by; None sorts last."""

    text: str
    value: float | str | None


class _Table(NamedTuple):
    titles: list[str]
    rows: list[list[_Cell]]


class _Example(NamedTuple):
    """A query that an expansion changed."""

    query: str
    plain: str
    expanded: str
    gain: str
    expansion: str


def _render(runs: Sequence[BenchResult]) -> str:
    jinja2 = require("jinja2", "report")
    vl_convert = require("vl_convert", "report")
    template = (resources.files("qe_edge.bench") / "templates" / "report.html").read_text(encoding="utf-8")
    # Queries and expansions are foreign text: escaped, also inside scripts (`tojson` writes < as \u003c).
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template).render(
        runs=runs,
        sections=[_view(section, several=len(runs) > 1) for section in merge(runs)],
        colours=charts.COLOURS,
        font=charts.FONT,
        config=charts.config(charts.css_paint),
        resamples=RESAMPLES,
        vega=vl_convert.javascript_bundle(),
    )


def _view(section: Section, several: bool) -> dict[str, Any]:
    """All that the template shows of a section."""
    best = section.best
    return {
        "info": section.info,
        "measure": section.measure,
        "fingerprint": section.fingerprint,
        "headline": headline(section),
        "caveat": caveat(len(section.queries)),
        "teachers": section.teachers,
        "pareto": charts.pareto(section, charts.css_paint, "container").to_dict() if section.timed else None,
        "per_query": [
            (_name(row, several), charts.per_query(section, row, charts.css_paint).to_dict())
            for row in section.of_kind("model")
            if row.bm25
        ],
        "quality": _quality(section),
        "speed": _speed(section) if section.timed else None,
        "best": _name(best, several) if best else None,
        "helped": _examples(section, best, helped=True),
        "hurt": _examples(section, best, helped=False),
    }


def _name(row: Row, several: bool) -> str:
    return f"{row.system.name} ({row.label})" if several else row.system.name
