"""A bench result as a table: for the terminal, and as Markdown for a README."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal, NamedTuple

from qe_edge.bench.result import BenchResult, DatasetResult, System
from qe_edge.measures import Interval

MISSING = "–"
# The common width of terminals, logs and issue comments that still holds every column.
WIDTH = 120
# Below this many queries, intervals are so wide that readers must be told.
FEW_QUERIES = 100


def score(value: float) -> str:
    """`.485`, as the field writes effectiveness."""
    text = f"{abs(value):.3f}"
    sign = "−" if value < 0 and text != "0.000" else ""
    return sign + text.removeprefix("0")


def signed(value: float) -> str:
    """`+.051` or `−.051`."""
    text = score(value)
    return text if text.startswith("−") or text == ".000" else f"+{text}"


def percent(value: float) -> str:
    """`97 %`."""
    return f"{100 * value:.0f} %".replace("-", "−")


def rate(value: float) -> str:
    """A speed or a size: whole numbers, one decimal below ten."""
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def bounds(interval: Interval, write: Callable[[float], str]) -> str:
    """`[.412, .561]`; `[54, 69]` of per cent, whose unit stands beside the mean."""
    return f"[{write(interval.low)}, {write(interval.high)}]".replace(" %", "")


def with_interval(interval: Interval | None, write: Callable[[float], str]) -> str:
    """`.485 [.412, .561]`."""
    if interval is None:
        return MISSING
    return f"{write(interval.mean)} {bounds(interval, write)}"


def caveat(queries: int) -> str:
    """How many queries there were, and what so few cannot show."""
    text = f"{queries} {'query' if queries == 1 else 'queries'}, 95 % bootstrap intervals."
    if queries < FEW_QUERIES:
        text += " So few cannot tell small differences from chance: see the interval of “vs BM25”."
    return text


class _Column(NamedTuple):
    title: str
    cell: Callable[[System], str]
    justify: Literal["left", "right"] = "right"


def _ratio(interval: Interval | None) -> str:
    return MISSING if interval is None else percent(interval.mean)


def _speed(attribute: str) -> Callable[[System], str]:
    def cell(system: System) -> str:
        return MISSING if system.speed is None else rate(getattr(system.speed, attribute))

    return cell


def _columns(measure: str) -> list[_Column]:
    return [
        _Column("system", lambda s: s.name, "left"),
        _Column("join", lambda s: MISSING if s.kind == "bm25" else s.join, "left"),
        _Column(measure, lambda s: with_interval(s.ndcg, score)),
        _Column("vs BM25", lambda s: with_interval(s.vs_bm25, signed)),
        _Column("of\nteacher", lambda s: _ratio(s.retention)),
        _Column("of its\ngain", lambda s: _ratio(s.gain_retention)),
        _Column("helped/\nhurt", lambda s: MISSING if s.kind == "bm25" else f"{s.helped}/{s.hurt}"),
        _Column("tok/s", _speed("decode_tokens_per_s")),
        _Column("ms/\nquery", _speed("ms_per_query_p50")),
        _Column("MB\nfile", _speed("file_mb")),
        _Column("MB\nmem", _speed("peak_memory_mb")),
    ]


def notes(dataset: DatasetResult) -> list[str]:
    """What a reader of the table must know: its size, its teacher, its failures."""
    lines = [caveat(len(dataset.queries))]
    if dataset.teacher is not None:
        lines.append(f"“Of teacher” and “of its gain” (over BM25) refer to {dataset.teacher}.")
    lines += [
        f"{system.name}: queries without an expansion, searched as they are: {system.failed}."
        for system in dataset.systems
        if system.failed
    ]
    return lines


def console_table(result: BenchResult) -> str:
    """All data sets of a result as text for a terminal, at most 120 columns wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    text = io.StringIO()
    # No markup: a model's name is data, whatever brackets it holds.
    console = Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False)
    for dataset in result.datasets:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for column in _columns(dataset.measure):
            # Only a long name may be folded; a figure never.
            table.add_column(
                column.title, justify=column.justify, overflow="fold", no_wrap=column.title != "system"
            )
        for system in dataset.systems:
            table.add_row(*(column.cell(system) for column in _columns(dataset.measure)))
        console.print(f"{dataset.info.name} on {result.label}\n")
        console.print(table)
        console.print("\n".join(["", *notes(dataset), ""]))
    return text.getvalue()


def markdown_table(dataset: DatasetResult) -> str:
    """One data set as a Markdown table with its notes, for a README."""
    columns = _columns(dataset.measure)
    rows = [
        [column.title.replace("/\n", "/").replace("\n", " ") for column in columns],
        [":--" if column.justify == "left" else "--:" for column in columns],
    ]
    rows += [[column.cell(system).replace("|", "\\|") for column in columns] for system in dataset.systems]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *notes(dataset), ""])
