"""`qe-edge report`: results of one or several machines, drawn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qe_edge.commands.common import (
    WORKDIR,
    JsonOption,
    WorkdirOption,
    emit,
    named_columns,
    took,
)
from qe_edge.console import note
from qe_edge.errors import BadArgument
from qe_edge.work.folder import Workdir


def _no_folder(option: typer.CallbackParam, file: Path | None) -> Path | None:
    if file and file.is_dir():
        raise BadArgument(f"{option.opts[0]} {file}: a folder; name a file in it")
    return file


def _check_targets(files: Sequence[Path | None], results: Sequence[Path]) -> None:
    """Refuse to write over a result or its record, or twice to one file."""
    from qe_edge.bench.result import RESULT
    from qe_edge.work.files import MANIFEST

    places = [file.resolve() for file in files if file]
    if len(set(places)) < len(places):
        raise BadArgument("give --out, --csv and --png a file each")
    for result in results:
        folder = (result if result.is_dir() else result.parent).resolve()
        for place in {folder / RESULT, folder / MANIFEST, result.resolve()}.intersection(places):
            raise BadArgument(f"{place} is what the report is made of; name another file")


def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Result files or folders (default: the newest bench).")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=_no_folder, help="The HTML file (default: beside the first result)."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", callback=_no_folder, help="Also draw the first result's chart as a picture."),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", callback=_no_folder, help="Also write every figure to this CSV file."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the tables as Markdown, with all columns.")
    ] = False,
    latex: Annotated[
        bool, typer.Option("--latex", help="Print the tables as LaTeX (booktabs), with the main columns.")
    ] = False,
    columns: Annotated[
        str, typer.Option(help="The only columns of the Markdown or LaTeX table; an unknown one lists all.")
    ] = "",
    workdir: WorkdirOption = WORKDIR,
    json: JsonOption = False,
) -> None:
    """Draw one HTML page from bench results of one or several machines."""
    from qe_edge.bench.report.report import chart_png
    from qe_edge.bench.report.report import report as verb
    from qe_edge.bench.report.table import csv_rows, latex_table, markdown_table
    from qe_edge.bench.result import read_result
    from qe_edge.work.files import write_bytes

    if markdown and latex:
        raise BadArgument("give either --markdown or --latex")
    shown = named_columns(columns)
    if shown and not (markdown or latex):
        raise BadArgument("--columns chooses those of a table: give --markdown or --latex, too")
    none_named = not results
    results = results or [Workdir(workdir).newest("bench", named="a result: qe-edge report RESULTS")]
    read = [read_result(path) for path in results]
    if none_named:
        on = " + ".join(data.info.name for data in read[0].datasets)
        took("result", results[0], f"the newest, on {on}")
    folder = results[0] if results[0].is_dir() else results[0].parent
    _check_targets([out or folder / "report.html", csv, png], results)
    artifacts = {"report": verb(results, out or folder / "report.html")}
    if csv:
        write_bytes(csv, csv_rows(read).encode())
        artifacts["csv"] = csv
    if png:  # last: it may be that there is nothing to draw
        artifacts["png"] = chart_png(read[0], png)
    text = "\n".join(str(path) for path in artifacts.values())
    if markdown:
        tables = [
            (data.info.name, markdown_table(data, shown, result))
            for result in read
            for data in result.datasets
        ]
        text = "\n".join(f"### {name}\n\n{table}" for name, table in tables)
    if latex:
        text = "\n".join(latex_table(data, shown, result) for result in read for data in result.datasets)
    in_text = markdown or latex
    if in_text:
        note(f"written, too: {', '.join(map(str, artifacts.values()))}")
    emit(
        json,
        "report",
        text,
        inputs={"results": [str(r) for r in results]},
        artifacts=artifacts,
        metrics={"tables": text} if in_text else {},
        following=("python", "-m", "webbrowser", artifacts["report"]),
        following_to=sys.stderr if in_text else None,
    )
