"""Expansions made elsewhere -> our rows."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from qe_edge.errors import BadArgument, BadInput
from qe_edge.lines import read_lines
from qe_edge.records import Expansion, Mode, read_jsonl
from qe_edge.retrieval.datasets import Dataset
from qe_edge.text import detect_language
from qe_edge.train.teach.ledger import Ledger
from qe_edge.train.teach.problems import problem_of
from qe_edge.train.teach.teach import EXPANSIONS, at_hand
from qe_edge.work.files import MANIFEST, write_json
from qe_edge.work.runs import check_output, read_record, run_record

Format = Literal["querygym", "query2doc", "jsonl"]
# QueryGym writes `query query query query query passage` where it is asked for "concat".
QUERYGYM_REPEATS = 5


class Query2Doc(msgspec.Struct, frozen=True):
    """A line of intfloat/query2doc_msmarco (Wang et al., arXiv 2303.07678)."""

    query_id: str | int
    query: str
    pseudo_doc: str


class ImportConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How to read a file, and whose work it holds."""

    format: Format = "jsonl"
    model: str = ""
    mode: Mode | None = None
    keep_bad: bool = False


def import_expansions(source: Path, config: ImportConfig, data: Dataset | None, *, out: Path) -> Counter[str]:
    """Check the expansions in a file and append the new ones to `out/expansions.jsonl`; returns counts.

    - `jsonl`: our own rows; `data`, `model` and `mode` are not needed.
    - `query2doc`: JSON Lines with `query_id`, `query`, `pseudo_doc`.
    - `querygym`: tab-separated query id and text, with or without the header and the query's repetitions.

    With `data`, rows of other queries than its judged ones are left out, as `pairs` would. Importing a file
    twice adds nothing.

    Raises:
        BadArgument: the format needs a data set, a model or a mode that is not given.
        BadInput: a malformed line, or no row at all is of the data set.
    """
    if config.format == "jsonl":
        own = list(read_jsonl(source, Expansion))
        rows = [row for row in own if not data or data.queries.get(row.query_id) == row.query]
        others = len(own) - len(rows)
    elif data is None or not config.model or not config.mode:
        raise BadArgument(
            f"{config.format} files name no data set, model and mode: give --dataset, --model, --mode"
        )
    else:
        texts = list((_query2doc if config.format == "query2doc" else _querygym)(source))
        rows = list(_of_dataset(texts, data, config.model, config.mode))
        others = len(texts) - len(rows)
    check_output(out, "teach")
    counts: Counter[str] = Counter()
    imported = [_checked(row, config) for row in rows]
    if not imported:
        raise BadInput(f"holds no expansion{f' of a query of {data}' if data else ''}", path=source)
    settings = {"dataset": str(data), **msgspec.to_builtins(config)}
    with Ledger(out / EXPANSIONS, Expansion, "teach", "candidates") as ledger:
        sessions = read_record(out).get("sessions", [])
        found = at_hand(data) if data else {}
        record = run_record("teach", settings, {"import": source}, sessions=sessions, **found)
        write_json(out / MANIFEST, record)
        for row in imported:
            if row.key in ledger.keys:
                counts["already there"] += 1
            else:
                ledger.append(row)
                counts[row.problem or "good"] += 1
    if others:
        counts["of other queries, left out"] = others
    return counts


def _checked(row: Expansion, config: ImportConfig) -> Expansion:
    problem = row.problem or problem_of(row.query, row.text, row.finish_reason)
    content = msgspec.json.encode(["import", row.dataset, row.query_id, row.model, row.mode, row.text])
    return msgspec.structs.replace(
        row,
        key=row.key or hashlib.sha256(content).hexdigest()[:16],
        problem=problem,
        text=row.text if problem in (None, "cut") or config.keep_bad else "",
    )


def _of_dataset(
    texts: Iterable[tuple[str, str]], data: Dataset, model: str, mode: Mode
) -> Iterator[Expansion]:
    """Rows of the data set's judged queries."""
    for query_id, text in texts:
        if query_id in data.queries:
            query = data.queries[query_id]
            yield Expansion(
                dataset=data.name,
                query_id=query_id,
                query=query,
                lang=detect_language(query),
                model=model,
                mode=mode,
                text=_without_repeats(query, " ".join(text.split())),
            )


def _query2doc(path: Path) -> Iterator[tuple[str, str]]:
    for row in read_jsonl(path, Query2Doc):
        yield str(row.query_id), row.pseudo_doc


def _querygym(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in read_lines(path):
        # Quotes are letters: that is how QueryGym writes. A carriage return within is no line's end either.
        lines = [line.replace("\r", " ")]
        try:
            row = next(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"), [])
        except csv.Error as error:
            raise BadInput(f"can't be read: {error}", path=path, line=number) from None
        if not row or (number == 1 and row[0] == "qid"):
            continue
        if len(row) < 2:
            raise BadInput("expected a query id, a tab and the text", path=path, line=number)
        yield row[0], " ".join(row[1:])


def _without_repeats(query: str, text: str) -> str:
    repeated = " ".join([" ".join(query.split())] * QUERYGYM_REPEATS)
    return text[len(repeated) :].strip() if text.startswith(repeated) else text
