"""The official files of TREC Deep Learning and MIRACL -> a folder in BEIR layout.

For machines that a data set's host can't be reached from, and for pools: passages that hold the judged ones
can stand in for the whole collection, and every figure then says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import progress
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.lines import raw_lines, read_lines
from qe_edge.retrieval.judged import Once, check_id, parse_grade
from qe_edge.work.files import atomic_path, sha256, write_json
from qe_edge.work.runs import check_not_here

ORIGIN = "origin.json"
QRELS_HEADER = "query-id\tcorpus-id\tscore\n"


class Official(msgspec.Struct, frozen=True):
    """What the publishers' files hold: SHA-256 of the judgments, and how many passages there are."""

    qrels: str
    passages: int


# The judgments as the TREC and MIRACL sites serve them.
OFFICIAL = {
    "dl19": Official("8a1f10d550732e4cd91d7fc49846a3784de4040972f583e69285a88f3c5fee92", 8_841_823),
    "dl20": Official("60d4c34561f9687f8f73e0a752ba80ab80159b3e9c1bedd0a351f747ed6f5684", 8_841_823),
    "dl21": Official("15d1c6e8b13fd665dd043c43213e331452213ddc70f70b8522600bcce64db427", 138_364_198),
    "miracl-zh": Official("5546474d3dc8139014e6571e9f4041848bb0a314ca6d2d4bac708174d71c59eb", 4_934_368),
    "miracl-zh-train": Official(
        "0ad7a35722803798058be9e4a8690b74b255591539f51827d49a1849a8585ee9", 4_934_368
    ),
}
# The keys of a passage's id, title and text, by collection.
_KEYS = (
    ("_id", "title", "text"),  # BEIR
    ("docid", "title", "text"),  # MIRACL
    ("pid", "", "passage"),  # MS MARCO v2
    ("id", "", "contents"),  # Pyserini
)


class Origin(msgspec.Struct, frozen=True):
    """Beside an imported collection: which files it was made of, and whether it is a pool."""

    name: str
    pool: bool
    passages: int
    missing_judged: int  # judged passages that aren't there
    lost_queries: int  # queries that lost all their judgments by that
    files: dict[str, str]  # name -> SHA-256


def import_dataset(
    name: str, *, topics: Path, qrels: Path, passages: Path, out: Path, pool: bool = False
) -> Origin:
    """Write `out/` with corpus.jsonl, queries.jsonl and qrels/test.tsv, whole or not at all.

    `topics` are lines of id, tab and text; `qrels` TREC's four columns; `passages` a file or folder of MS
    MARCO's collection.tsv, its v2's or MIRACL's JSON Lines, or BEIR's corpus.jsonl, each plain or gzipped.
    With `pool` they needn't hold all passages; judgments of those that are missing are left out and counted.

    Raises:
        NotFound, BadInput: a file is missing or malformed, judges unknown queries, or isn't the official one.
        BadArgument: `name` can't be one, `out` holds something else, or passages are missing and `pool`
            wasn't given.
    """
    _check_place(name, out)
    official = OFFICIAL.get(name)
    if official and sha256(_existing(qrels)) != official.qrels:
        raise BadInput(f"isn't the official file of {name}: its SHA-256 differs", path=qrels)
    queries = _topics(_existing(topics))
    judged = _judgments(_existing(qrels), queries)
    with atomic_path(out) as partial:
        (partial / "qrels").mkdir(parents=True)
        total = official.passages if official else 0
        ids = _copy(_existing(passages), partial / "corpus.jsonl", name, total)
        wanted = {doc_id for _, doc_id in judged}
        missing = wanted - ids
        complete = not missing and total in (0, len(ids))
        if not complete and not pool:
            raise BadArgument(
                f"{passages} holds {len(ids):,} passages{f' of {total:,}' if total else ''}, and lacks "
                f"{len(missing):,} of the {len(wanted):,} judged ones; with --pool it stands in for the "
                "collection, and every figure says so"
            )
        kept = {key: grade for key, grade in judged.items() if key[1] in ids}
        if not kept:
            raise BadInput("none of its passages is judged, so nothing could be measured", path=passages)
        rows = [msgspec.json.encode({"_id": i, "text": text}) + b"\n" for i, text in queries.items()]
        (partial / "queries.jsonl").write_bytes(b"".join(rows))
        lines = [f"{query_id}\t{doc_id}\t{grade}\n" for (query_id, doc_id), grade in kept.items()]
        (partial / "qrels" / "test.tsv").write_text(QRELS_HEADER + "".join(lines), encoding="utf-8")
        digests = {path.name: sha256(path) for path in (topics, qrels)}
        lost = len({query_id for query_id, _ in judged} - {query_id for query_id, _ in kept})
        is_pool = not complete or (pool and official is None)
        origin = Origin(name, is_pool, len(ids), len(missing), lost, digests)
        write_json(partial / ORIGIN, origin)
    return origin


def _check_place(name: str, out: Path) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BadArgument(f"{name!r} can't be a data set's name: letters, digits, dots and dashes can")
    check_not_here(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        try:
            found = read_origin(out) if out.is_dir() else None
        except BadInput:
            found = None
        written = {"corpus.jsonl", "queries.jsonl", "qrels", ORIGIN, "qrels/test.tsv"}
        others = {path.relative_to(out).as_posix() for path in out.rglob("*")} - written if found else set()
        if not found or found.name != name or others:
            what = f", such as {min(others)}" if others else ""
            raise BadArgument(
                f"{out} holds something other than `qe-edge data import {name}` made{what}; "
                "choose a new folder"
            )


def _copy(passages: Path, corpus: Path, name: str, total: int) -> set[str]:
    """Write the passages in BEIR's keys; returns their ids."""
    ids: set[str] = set()
    with corpus.open("wb") as written, progress(f"importing {name}", total) as advance:
        for file in _passage_files(passages):
            for number, passage in _passages(file):
                if passage["_id"] in ids:
                    raise BadInput(f"passage {passage['_id']!r} is there twice", path=file, line=number)
                ids.add(passage["_id"])
                written.write(msgspec.json.encode(passage) + b"\n")
                if len(ids) % 1000 == 0:
                    advance(1000)
    return ids


def read_origin(folder: Path) -> Origin | None:
    """How an imported collection came to be; None for any other."""
    file = folder / ORIGIN
    try:
        return msgspec.json.decode(file.read_bytes(), type=Origin) if file.is_file() else None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"is damaged ({error}); import the collection again", path=file) from None


def _existing(path: Path) -> Path:
    if not path.exists():
        raise NotFound(f"{path}: no such file")
    return path


def _topics(path: Path) -> dict[str, str]:
    topics = Once[str, str]("topic", path)
    for number, line in read_lines(path):
        query_id, tab, text = line.partition("\t")
        if not tab or not text.strip():
            raise BadInput("expected a topic's id, a tab and its text", path=path, line=number)
        check_id(query_id, "topic", path, number)
        topics.add(number, query_id, text.strip())
    return topics.rows


def _judgments(path: Path, queries: dict[str, str]) -> dict[tuple[str, str], int]:
    judged = Once[tuple[str, str], int]("the judgment of", path)
    for number, line in read_lines(path):
        try:
            query_id, _, doc_id, grade = line.split()
            score = parse_grade(grade)
        except ValueError:
            raise BadInput("expected query id, 0, document id and grade", path=path, line=number) from None
        if query_id not in queries:
            raise BadInput(f"query {query_id!r} is not among the topics", path=path, line=number)
        judged.add(number, (query_id, doc_id), score)
    return judged.rows


def _passage_files(passages: Path) -> Iterator[Path]:
    if passages.is_file():
        yield passages
    elif (passages / "corpus.jsonl").is_file():  # BEIR, whose queries are JSON Lines too
        yield passages / "corpus.jsonl"
    else:
        found = [p for p in sorted(passages.rglob("[!.]*")) if _kind(p) and p.is_file()]
        if not found:
            raise NotFound(f"{passages} holds no .tsv, .jsonl or .gz of passages; unpack archives first")
        if any(_kind(p) == "tsv" for p in found) and len(found) > 1:
            names = ", ".join(p.name for p in found[:3])
            raise BadArgument(f"{passages} holds several files ({names} …); name the one with the passages")
        yield from found


def _kind(path: Path) -> str | None:
    zipped = path.suffix == ".gz"
    suffix = path.with_suffix("").suffix if zipped else path.suffix
    if suffix == "":  # the files of MS MARCO v2 are called msmarco_passage_00.gz
        return "json" if zipped else None
    return {".tsv": "tsv", ".jsonl": "json", ".json": "json"}.get(suffix)


def _passages(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and passage, in BEIR's keys."""
    if _kind(path) == "tsv":
        for number, line in read_lines(path):
            doc_id, tab, text = line.partition("\t")
            if not tab:
                raise BadInput("expected a passage's id, a tab and its text", path=path, line=number)
            check_id(doc_id, "passage", path, number)
            yield number, {"_id": doc_id, "text": text}
        return
    for number, content in raw_lines(path):
        try:
            row: dict[str, Any] = msgspec.json.decode(content, type=dict[str, Any])
        except msgspec.MsgspecError as error:
            raise BadInput(f"not a JSON object: {error}", path=path, line=number) from None
        keys = next((k for k in _KEYS if k[0] in row and isinstance(row.get(k[2]), str)), None)
        if keys is None:
            raise BadInput("has no id and text under any known names", path=path, line=number)
        doc_id, title = str(row[keys[0]]), row.get(keys[1]) or ""
        check_id(doc_id, "passage", path, number)
        if not isinstance(title, str):
            raise BadInput(f"its title is {title!r}, not a text", path=path, line=number)
        yield number, {"_id": doc_id, "title": title, "text": row[keys[2]]}
