"""A folder of notes -> a collection of passages in BEIR's layout; run again, it takes what has changed."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec

from qe_edge.console import progress, shown
from qe_edge.documents.convert import KINDS, read_texts
from qe_edge.documents.passages import WORDS, split
from qe_edge.errors import BadArgument, BadInput, NotFound, NotInstalled
from qe_edge.lines import raw_lines
from qe_edge.records import Document, encode_jsonl
from qe_edge.work.files import write_bytes, write_json
from qe_edge.work.runs import check_place, is_litter

CORPUS, SOURCES = "corpus.jsonl", "sources.json"
RULES = 2  # of reading and splitting; passages of other ones are made anew


class Source(msgspec.Struct, frozen=True):
    """A file as it was read, and how many passages it gave; with a `problem`, why it gave none."""

    bytes: int
    modified: int  # nanoseconds
    passages: int
    problem: str = ""


class Sources(msgspec.Struct):
    """Beside a collection that `make_collection` wrote: what it was made of."""

    folder: str
    words: int
    rules: int
    corpus: str  # SHA-256
    files: dict[str, Source]


class Made(msgspec.Struct, frozen=True):
    """What came of a folder: `problems` by file, and how many files of each `unknown` kind were left out."""

    files: int
    unchanged: int
    passages: int
    problems: dict[str, str]
    unknown: dict[str, int]


def make_collection(folder: Path, out: Path, *, words: int = WORDS) -> Made:
    """Write `out/corpus.jsonl`: the passages of all files of a folder that can be read, hidden ones left out.

    A passage's id is the file's path in the folder and where it stands: `trips/rome.md#L12` begins in line
    12, `report.pdf#3` is the third, and `mails.jsonl:7#1` is the first of the record in line 7. Files whose
    size and time are as before are not read again.

    Raises:
        NotFound, BadArgument: there is no such folder, or `out` holds another collection.
        BadInput: there is no passage in it.
    """
    folder, out = folder.resolve(), out.resolve()
    if not folder.is_dir():
        raise NotFound(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    check_place(out)
    before, lines = _before(folder, out, words)
    found = list(_files(folder, out))
    unknown = Counter(path.suffix.lower() or path.name for path in found if path.suffix.lower() not in KINDS)
    files: dict[str, Source] = {}
    corpus: list[bytes] = []
    unchanged = 0
    readable = [path for path in found if path.suffix.lower() in KINDS]
    with progress("reading", len(readable)) as advance:
        for path in readable:
            name = path.relative_to(folder).as_posix()
            try:
                stat = path.stat()
            except OSError as error:
                said = "a link to a file that isn't there" if path.is_symlink() else error.strerror
                files[name] = Source(0, 0, 0, f"{name}: {said}")
                advance()
                continue
            known = before.get(name)
            if (
                known
                and not known.problem
                and (known.bytes, known.modified) == (stat.st_size, stat.st_mtime_ns)
            ):
                files[name], part = known, lines[name]
                unchanged += 1
            else:
                problem, part = "", []
                try:
                    part = encode_jsonl(_passages(path, name, words)).splitlines(keepends=True)
                except (BadInput, NotInstalled, OSError) as error:
                    said = str(error).replace(str(path), name)
                    problem = said if name in said else f"{name}: {said}"
                if not part:
                    problem = problem or f"{name}: holds no text"
                files[name] = Source(stat.st_size, stat.st_mtime_ns, len(part), problem)
            corpus += part
            advance()
    if not corpus:
        raise BadInput("holds no text that can be read; known are " + ", ".join(KINDS), path=folder)
    content = b"".join(corpus)
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(content).hexdigest()
    # First: killed between the two, the same call makes it anew, and knows the folder for one of its own.
    write_json(out / SOURCES, msgspec.to_builtins(Sources(shown(str(folder)), words, RULES, digest, files)))
    write_bytes(out / CORPUS, content)
    problems = {name: source.problem for name, source in files.items() if source.problem}
    return Made(len(files), unchanged, len(corpus), problems, dict(unknown))


def _before(folder: Path, out: Path, words: int) -> tuple[dict[str, Source], dict[str, list[bytes]]]:
    """What an earlier run made of the folder, by file: its record and its lines of the collection."""
    if not out.exists() or all(is_litter(path) for path in out.iterdir()):
        return {}, {}
    if not (out / SOURCES).is_file():
        raise BadArgument(f"{out} holds something other than a collection made of notes; choose a new folder")
    try:
        made = msgspec.json.decode((out / SOURCES).read_bytes(), type=Sources)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(
            f"is none that `qe-edge data make` wrote, or damaged ({error}); choose another folder",
            path=out / SOURCES,
        ) from None
    if made.folder != shown(str(folder)):
        raise BadArgument(f"{out} was made of {made.folder}; choose a new folder with --out")
    corpus = out / CORPUS
    same = corpus.is_file() and hashlib.sha256(corpus.read_bytes()).hexdigest() == made.corpus
    if not same or (made.words, made.rules) != (words, RULES):
        return {}, {}
    written = (line + b"\n" for _, line in raw_lines(corpus))
    return made.files, {
        name: [next(written) for _ in range(source.passages)] for name, source in made.files.items()
    }


def _files(folder: Path, out: Path) -> Iterator[Path]:
    """All files that are not hidden, sorted; not what we wrote, nor a judged collection's queries."""
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if CORPUS in names:
            folders[:] = [name for name in folders if name != "qrels"]
            names = [name for name in names if name != "queries.jsonl"]
        folders[:] = sorted(name for name in folders if not name.startswith(".") and here / name != out)
        yield from (here / name for name in sorted(names) if not name.startswith("."))


def _passages(file: Path, name: str, words: int) -> Iterator[Document]:
    stem = re.sub(r"[\s%#]", lambda found: quote(found[0]), shown(name))
    for text in read_texts(file):
        source = f"{stem}:{text.record}" if text.record else stem
        ids: Counter[str] = Counter()
        found = split(text.lines, title=text.title or file.stem, markdown=text.markdown, words=words)
        for count, passage in enumerate(found, 1):
            place = f"{source}#L{passage.line}" if passage.line else f"{source}#{count}"
            ids[place] += 1  # several passages may begin in one line
            again = f".{ids[place]}" if ids[place] > 1 else ""
            yield Document(id=place + again, text=passage.text, title=passage.title)
