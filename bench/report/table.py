"""A bench result as a table: for the terminal, and as Markdown for a README."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from qe_edge.bench.result import BenchResult, DatasetResult, System
from qe_edge.retrieval.measures import Interval

MISSING = "–"
# The common width of terminals, logs and issue comments that still holds every column.
WIDTH = 120
# Below this many queries, intervals are so wide that readers must be told.
FEW_QUERIES = 100
ALPHA = 0.05


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
        value = getattr(system.speed, attribute, None)
        return MISSING if value is None else rate(value)

    return cell


def _columns(measure: str) -> list[_Column]:
    return [
        _Column("system", lambda s: s.name, "left"),
        _Column("join", lambda s: s.join or MISSING, "left"),
        _Column(measure, lambda s: with_interval(s.ndcg, score)),
        _Column("vs BM25", lambda s: with_interval(s.vs_bm25, signed) + significance(s)),
        _Column("of\nteacher", lambda s: _ratio(s.retention)),
        _Column("of its\ngain", lambda s: _ratio(s.gain_retention)),
        _Column("helped/\nhurt", lambda s: MISSING if s.kind == "bm25" else f"{s.helped}/{s.hurt}"),
        _Column("tok/s", _speed("decode_tokens_per_s")),
        _Column("ms/\nquery", _speed("ms_per_query_p50")),
        _Column("MB\nfile", _speed("file_mb")),
        _Column("MB\nmem", _speed("peak_memory_mb")),
    ]


def significance(system: System) -> str:
    """A star where the difference to BM25 is significant, for a column of such differences."""
    return "*" if system.p_vs_bm25 is not None and system.p_vs_bm25 < ALPHA else ""


def _more_columns(dataset: DatasetResult) -> list[_Column]:
    """The other measures, and nDCG@10 at each token budget, where there are any."""

    def interval(values: str, key: str | int) -> Callable[[System], str]:
        def cell(system: System) -> str:
            found = getattr(system, values).get(key)
            return MISSING if found is None else score(found.mean)

        return cell

    measures = dict.fromkeys(name for system in dataset.systems for name in system.measures)
    budgets = sorted({budget for system in dataset.systems for budget in system.budgets})
    return [
        *(_Column(name, interval("measures", name)) for name in measures),
        *(_Column(f"{budget}\ntokens", interval("budgets", budget)) for budget in budgets),
    ]


def notes(dataset: DatasetResult) -> list[str]:
    """What a reader of the table must know: its size, its teacher, its failures."""
    lines = [caveat(len(dataset.queries))]
    if any(system.p_vs_bm25 is not None for system in dataset.systems):
        lines.append(
            f"* p < {score(ALPHA).rstrip('0')} against BM25: paired randomization test, corrected by Holm "
            f"over {len(dataset.systems) - 1} systems."
        )
    if any(system.budgets for system in dataset.systems):
        lines.append(f"N tokens: {dataset.measure} when each expansion ends after so many.")
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
        main, more = _columns(dataset.measure), _more_columns(dataset)
        console.print(f"{dataset.info.name} on {result.label}\n")
        for columns in [main, *([[*main[:2], *more]] if more else [])]:
            table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
            for column in columns:
                # Only a long name may be folded; a figure never.
                table.add_column(
                    column.title, justify=column.justify, overflow="fold", no_wrap=column.title != "system"
                )
            for system in dataset.systems:
                table.add_row(*(column.cell(system) for column in columns))
            console.print(table)
            console.print()
        console.print("\n".join([*notes(dataset), ""]))
    for tuning in result.tuning:
        console.print(
            f"{tuning.model}: join {tuning.chosen}, the best of {len(tuning.curve)} on {tuning.dataset}"
        )
    return text.getvalue()


def markdown_table(dataset: DatasetResult) -> str:
    """One data set as a Markdown table with its notes, for a README."""
    titles, justify, rows = _cells(dataset)
    lines = [titles, [":--" if side == "left" else "--:" for side in justify]]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *notes(dataset), ""])


def latex_table(dataset: DatasetResult) -> str:
    """One data set as a table for a paper, in the style of booktabs, its notes as a comment."""
    titles, justify, rows = _cells(dataset)
    lines = [
        *(f"% {note}" for note in notes(dataset)),
        f"\\begin{{tabular}}{{{''.join(side[0] for side in justify)}}}",
        "\\toprule",
        f"{' & '.join(map(_latex, titles))} \\\\",
        "\\midrule",
        *(f"{' & '.join(map(_latex, row))} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"−": "$-$", "–": "--"}
    return "".join(special.get(letter, letter) for letter in text)


def _cells(dataset: DatasetResult) -> tuple[list[str], list[str], list[list[str]]]:
    """Titles, sides and cells of a table that is as wide as it needs to be."""
    columns = _columns(dataset.measure) + _more_columns(dataset)
    titles = [column.title.replace("/\n", "/").replace("\n", " ") for column in columns]
    rows = [[column.cell(system) for column in columns] for system in dataset.systems]
    return titles, [column.justify for column in columns], rows


def csv_rows(results: Sequence[BenchResult]) -> str:
    """All systems of all results as CSV, one a line: every figure, with the ends of its interval."""
    lines = []
    for result in results:
        for dataset in result.datasets:
            for system in dataset.systems:
                line: dict[str, Any] = {"machine": result.label, "dataset": dataset.info.name}
                line |= _flat(msgspec.to_builtins(system, str_keys=True))
                lines.append(line)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures under names with dots; what differs by query is left out."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("per_query", "expansions"):
            continue
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
