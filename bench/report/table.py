"""A bench result as a table: for a terminal, a README, a paper or a spreadsheet."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from qe_edge.bench.report.columns import NAME, Column, added, all_columns, chosen, narrow, no_yardstick, notes
from qe_edge.bench.report.figures import MISSING
from qe_edge.bench.result import BenchResult, DatasetResult, System
from qe_edge.console import several

WIDTH = 80  # of every terminal
GAP = "  "


def console_table(result: BenchResult, columns: Sequence[str] = ()) -> str:
    """All data sets of a result as text of 80 columns; what has no room beside the first columns is below."""
    lines: list[str] = []
    for dataset in result.datasets:
        groups = [chosen(dataset, columns)] if columns else [narrow(dataset), added(dataset)]
        shown = [column for group in groups for column in group]
        blocks = [block for group in groups for block in _blocks(dataset.systems, group)]
        lines += [f"{dataset.info.name} on {result.label}", ""]
        for number, block in enumerate(blocks):
            # Of the further ones only rows that have a figure there; all where columns are asked for.
            having = [s for s in dataset.systems if any(column.cell(s) != MISSING for column in block)]
            if columns and not having:
                having = dataset.systems
            if not number or having:
                lines += [*_aligned(having if number else dataset.systems, block), ""]
        lines += [*(line for note in notes(dataset, shown, result) for line in _wrapped(note)), ""]
    for tuning in result.tuning:
        chose = f"the best of {len(tuning.curve)} on {tuning.dataset}"
        lines.append(f"{tuning.model}: join {tuning.chosen}, {chose}")
    return "\n".join(lines).rstrip() + "\n"


def _blocks(systems: Sequence[System], columns: Sequence[Column]) -> list[list[Column]]:
    """The columns by tables that fit."""
    from rich.cells import cell_len

    blocks: list[list[Column]] = []
    for column in columns:
        if blocks and max(map(cell_len, _aligned(systems, [*blocks[-1], column]))) <= WIDTH:
            blocks[-1].append(column)
        else:
            blocks.append([column])
    return blocks


def _aligned(systems: Sequence[System], columns: Sequence[Column]) -> list[str]:
    """Rows of equal width. Where a name leaves the figures no room, all names stand on lines of their own."""
    from rich.cells import cell_len

    def padded(texts: Sequence[str], justify: str) -> list[str]:
        width = max(map(cell_len, texts))
        blanks = [" " * (width - cell_len(text)) for text in texts]
        pairs = zip(texts, blanks, strict=True)
        return [text + more if justify == "left" else more + text for text, more in pairs]

    height = max(column.title.count("\n") for column in columns) + 1
    cells = [
        padded([*_head(column.title, height), *map(column.cell, systems)], column.justify)
        for column in columns
    ]
    names = [*_head(NAME.title, height), *(system.name for system in systems)]
    for gap in (GAP, " "):
        lines = [gap.join(row) for row in zip(padded(names, "left"), *cells, strict=True)]
        if cell_len(lines[0]) <= WIDTH:
            break
    else:
        figures = [GAP + GAP.join(row) for row in zip(*cells, strict=True)]
        pairs = zip(names[height:], figures[height:], strict=True)
        lines = [*figures[:height], *(line for pair in pairs for line in pair)]
    rule = "─" * max(map(cell_len, lines))
    return [line.rstrip() for line in [*lines[:height], rule, *lines[height:]]]


def _wrapped(note: str) -> list[str]:
    """A note on lines that fit, Chinese characters counted as two."""
    from rich.console import Console
    from rich.text import Text

    console = Console(width=WIDTH, color_system=None)
    return [line.plain.rstrip() for line in Text(note).wrap(console, WIDTH)]


def _head(title: str, height: int) -> list[str]:
    """A title on so many lines, the upper ones empty."""
    lines = title.split("\n")
    return [""] * (height - len(lines)) + lines


def markdown_table(
    dataset: DatasetResult, columns: Sequence[str] = (), run: BenchResult | None = None
) -> str:
    """One data set as a Markdown table with its notes; where no column is named, all that say something."""
    filled = [c for c in all_columns(dataset) if any(c.cell(s) != MISSING for s in dataset.systems)]
    unasked = "of-teacher" if no_yardstick(dataset) else ""
    shown = chosen(dataset, columns) if columns else [c for c in filled if c.key != unasked]
    titles, rows = _cells(dataset, shown)
    lines = [titles, [":--" if column.justify == "left" else "--:" for column in [NAME, *shown]]]
    lines += [[cell.replace("|", "\\|") for cell in row] for row in rows]
    # A star that begins a line would begin a list.
    told = ["- " + re.sub(r"^[*]", r"\\*", note) for note in notes(dataset, shown, run)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *told, ""])


def latex_table(dataset: DatasetResult, columns: Sequence[str] = (), run: BenchResult | None = None) -> str:
    """One data set as a table for a paper, with its caption and notes; it needs the package booktabs."""
    measures = [column for column in added(dataset) if not column.key.endswith("-tokens")]
    shown = chosen(dataset, columns) if columns else [*narrow(dataset), *measures]
    titles, rows = _cells(dataset, shown)
    measured = [several(len(dataset.queries), "query", "queries"), *([run.label] if run else [])]
    caption = f"{dataset.measure} on {dataset.info.name}, {', '.join(measured)}."
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex(caption)}}}",
        f"\\begin{{tabular}}{{{''.join(column.justify[0] for column in [NAME, *shown])}}}",
        "\\toprule",
        f"{' & '.join(map(_latex, titles))} \\\\",
        "\\midrule",
        *(f"{' & '.join(map(_latex, row))} \\\\" for row in rows),
        "\\bottomrule",
        "\\end{tabular}",
        "",
        "\\par\\smallskip\\footnotesize",
        *(_latex(note) for note in notes(dataset, shown, run)),
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"−": "$-$", "–": "--"}
    special |= {"<": "$<$", ">": "$>$", "“": "``", "”": "''"}
    parts = ["".join(special.get(letter, letter) for letter in part) for part in text.split("`")]
    return "".join(f"\\texttt{{{part}}}" if number % 2 else part for number, part in enumerate(parts))


def _cells(dataset: DatasetResult, shown: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of a table that is as wide as it needs to be."""
    columns = [NAME, *shown]
    titles = [column.title.replace("\n", " ") for column in columns]
    return titles, [[column.cell(system) for column in columns] for system in dataset.systems]


def csv_rows(results: Sequence[BenchResult]) -> str:
    """All systems of all results as CSV, one a line: every figure, with the ends of its interval."""
    lines = []
    for result in results:
        for dataset in result.datasets:
            for system in dataset.systems:
                line: dict[str, Any] = {"machine": result.label, "dataset": dataset.info.name}
                line["queries"] = len(dataset.queries)
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
        elif value is not None:  # an interval that is missing has no column beside its ends
            found[prefix + key] = value
    return found
