"""The charts of a report, as Vega-Lite: effectiveness against speed, and the gain of each query."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from qe_edge.bench.report.figures import rate, score, signed, with_interval
from qe_edge.bench.report.labels import HEIGHT, Line, Plane, Point
from qe_edge.bench.report.section import Measurement, Section
from qe_edge.errors import require

Paint = Callable[[str], str]
"""The colour of a role: a CSS variable in a page, a fixed value in an image."""

# role -> (light, dark). A page switches between the two by CSS alone: charts are not drawn again.
COLOURS = {
    "page": ("#ffffff", "#14171a"),
    "panel": ("#f5f6f8", "#1c2126"),
    "ink": ("#1d2329", "#e4e7ea"),
    "muted": ("#5c6670", "#9ba5ae"),
    "line": ("#dde1e5", "#333a41"),
    "gain": ("#2f7d57", "#5fbf8f"),
    "loss": ("#b4493a", "#e58271"),
    "series-1": ("#2563a8", "#6fb0f2"),
    "series-2": ("#b35c00", "#f0a24e"),
    "series-3": ("#7a3fa0", "#c493e6"),
    "series-4": ("#0f7f86", "#4fc4cb"),
    "series-5": ("#a8326e", "#ee88b8"),
    "series-6": ("#5f6b1d", "#b9c65c"),
}
_SERIES = [role for role in COLOURS if role.startswith("series")]
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif'


def css_paint(role: str) -> str:
    """The CSS variable of a role."""
    return f"var(--{role})"


def light_paint(role: str) -> str:
    """The fixed colour of a role on white."""
    return COLOURS[role][0]


def pareto(section: Section, paint: Paint, width: int | Literal["container"]) -> Any:
    """nDCG with its interval against decode tokens/s; what writes nothing here, such as BM25, as lines.

    The section must have a model with a known speed.
    """
    alt = require("altair", "report")
    values = [_point(section, row) for row in section.drawn]
    references = section.references
    plane = Plane(
        [Point(f"{v['model']} {score(v['y'])}", v["x"], v["low"], v["y"], v["high"]) for v in values],
        [Line(f"{r.system.name} {score(r.system.ndcg.mean)}", r.system.ndcg.mean) for r in references],
    )
    lines = [
        {"y": row.system.ndcg.mean, "dash": [1, 0] if row.system.kind == "teacher" else [4, 3]}
        for row in references
    ]
    reads = any(" + refine" in row.system.name for row in section.drawn)
    what = "decode tokens/s, without the time of reading" if reads else "decode tokens/s"
    x_axis = alt.Axis(values=plane.x_ticks(), format="~s", title=f"{what}, log scale (faster →)")
    x = alt.X("x:Q", scale=alt.Scale(type="log", domain=plane.x_domain, nice=False), axis=x_axis)
    y_scale = alt.Scale(domain=plane.y_domain, zero=False, nice=False)
    y = alt.Y("y:Q", scale=y_scale, axis=alt.Axis(title=section.measure, tickCount=6))
    tooltip = _tooltip({"model": "model", "score": section.measure, **_FIGURES, "machine": "machine"})
    points = alt.Chart(alt.Data(values=values)).encode(
        x=x, color=_by_machine(section, paint), tooltip=tooltip
    )
    layers = [
        alt.Chart(alt.Data(values=lines))
        .mark_rule(color=paint("muted"), strokeWidth=1.2, strokeDash=alt.ExprRef("datum.dash"))
        .encode(y=y),
        points.mark_rule(strokeWidth=2, opacity=0.5).encode(y=alt.Y("low:Q", scale=y_scale), y2="high:Q"),
        points.mark_point(filled=True, size=90, opacity=1).encode(y=y),
        alt.Chart(alt.Data(values=plane.labels()))
        .mark_text(align=alt.ExprRef("datum.align"), baseline="middle", color=paint("ink"))
        .encode(x=x, y=y, text="text:N"),
    ]
    description = f"{section.measure} against decode tokens per second on {section.info.name}"
    return alt.layer(*layers).properties(width=width, height=HEIGHT, description=description)


def by_budget(section: Section, paint: Paint, width: int | Literal["container"]) -> Any:
    """nDCG against the tokens of each expansion that are used, from one generation; BM25 as a line.

    Of models that did the same on several machines, one is drawn.
    """
    alt = require("altair", "report")
    values: list[dict[str, Any]] = []
    for name, row in section.distinct_models():
        if row.system.budgets:
            curve = {str(budget): interval for budget, interval in sorted(row.system.budgets.items())}
            for tokens, interval in (curve | {"all": row.system.ndcg}).items():
                figure = with_interval(interval, score)
                values.append({"tokens": tokens, "y": interval.mean, "model": name, "score": figure})
    names = list(dict.fromkeys(value["model"] for value in values))
    ticks = sorted({int(v["tokens"]) for v in values if v["tokens"] != "all"})
    plain = [{"y": row.system.ndcg.mean} for row in section.of_kind("bm25")]
    y = alt.Y("y:Q", scale=alt.Scale(zero=False), axis=alt.Axis(title=section.measure, tickCount=6))
    colours = alt.Scale(domain=names, range=[paint(_SERIES[i % len(_SERIES)]) for i in range(len(names))])
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=300)
    x_axis = alt.Axis(title="tokens of each expansion that are used", labelAngle=0)
    lines = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("tokens:O", sort=[*map(str, ticks), "all"], axis=x_axis),
        y=y,
        color=alt.Color("model:N", scale=colours, legend=legend),
        tooltip=_tooltip({"model": "model", "tokens": "tokens", "score": section.measure}),
    )
    rule = alt.Chart(alt.Data(values=plain)).mark_rule(color=paint("muted"), strokeDash=[4, 3]).encode(y=y)
    description = f"{section.measure} by the tokens that are used on {section.info.name}"
    return alt.layer(
        rule, lines.mark_line(strokeWidth=2), lines.mark_point(filled=True, size=60, opacity=1)
    ).properties(width=width, height=260, description=description)


def per_query(section: Section, row: Measurement, paint: Paint) -> Any:
    """One bar per query: the difference to plain BM25, best first, on one scale for all models."""
    alt = require("altair", "report")
    gains = row.gains()
    reach = max(abs(gain) for model in section.of_kind("model") for gain in [*model.gains().values(), 0.1])
    values = [
        {
            "rank": rank,
            "gain": gain,
            "query": section.queries.get(query_id, query_id),
            "plain": score(row.system.per_query[query_id] - gain),
            "expanded": score(row.system.per_query[query_id]),
            "difference": signed(gain),
        }
        for rank, (query_id, gain) in enumerate(gains.items(), 1)
    ]
    y_axis = alt.Axis(title=None, tickCount=5, format="+.1f")
    colour = alt.condition("datum.gain > 0", alt.value(paint("gain")), alt.value(paint("loss")))
    return (
        alt.Chart(alt.Data(values=values))
        .mark_bar()
        .encode(
            x=alt.X("rank:O", axis=None),
            y=alt.Y("gain:Q", scale=alt.Scale(domain=[-reach, reach]), axis=y_axis),
            color=colour,
            tooltip=_tooltip(
                {
                    "query": "query",
                    "plain": "plain BM25",
                    "expanded": "with expansion",
                    "difference": "difference",
                }
            ),
        )
        .properties(
            width="container", height=130, description=f"{row.system.name}: difference to BM25 of each query"
        )
    )


def config(paint: Paint, background: str | None = None) -> dict[str, Any]:
    """The look that all charts share."""
    text = {
        "labelColor": paint("muted"),
        "titleColor": paint("ink"),
        "labelFontSize": 12,
        "titleFontSize": 12,
    }
    lines = {"gridColor": paint("line"), "domainColor": paint("line"), "tickColor": paint("line")}
    return {
        "background": background,
        "font": FONT,
        "view": {"stroke": None},
        "axis": {**text, **lines, "titleFontWeight": "normal", "titlePadding": 10},
        "legend": {**text, "labelColor": paint("ink")},
        "text": {"fontSize": 12},
        "title": {"color": paint("ink"), "subtitleColor": paint("muted"), "anchor": "start", "fontSize": 15},
    }


# The speed figures of a tooltip -> their titles.
_FIGURES = {
    "decode_tokens_per_s": "tokens/s",
    "ms_per_query_p50": "ms per query",
    "file_mb": "MB file",
    "peak_memory_mb": "MB memory",
}


def _point(section: Section, row: Measurement) -> dict[str, Any]:
    system, speed = row.system, row.system.speed
    return {
        "x": row.tokens_per_s,
        "y": system.ndcg.mean,
        "low": system.ndcg.low,
        "high": system.ndcg.high,
        "machine": row.label,
        "model": section.title(row),
        "score": with_interval(system.ndcg, score),
        **{name: rate(getattr(speed, name)) for name in _FIGURES},
    }


def _by_machine(section: Section, paint: Paint) -> Any:
    alt = require("altair", "report")
    labels = section.labels
    scale = alt.Scale(domain=labels, range=[paint(_SERIES[i % len(_SERIES)]) for i in range(len(labels))])
    several = alt.Legend(title=None, orient="top", direction="vertical", labelLimit=300, symbolOpacity=1)
    return alt.Color("machine:N", scale=scale, legend=several if len(labels) > 1 else None)


def _tooltip(titles: dict[str, str]) -> Any:
    """Field -> the title to show it under."""
    alt = require("altair", "report")
    return [alt.Tooltip(field=field, type="nominal", title=title) for field, title in titles.items()]
