"""Search a folder of notes on this machine: `python app.py [FOLDER]`, then open the page it names.

Plain BM25 answers while you type. The student's words arrive after, as chips that can be clicked away. With
`--reader` they are also those of the notes that its text finds.
"""

import json
import sqlite3
from argparse import ArgumentParser
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import parse_qs, urlsplit

from qe_edge import ExpandedQuery, Expander, QeEdgeError, queries, words_of

HERE = Path(__file__).parent
KINDS, CHIPS, RESULTS, AROUND = (".md", ".txt"), 24, 10, 90
DEADLINE_MS = 3000


class Notes:
    """The notes in SQLite FTS5, as words (Chinese in pairs of characters) that Porter's stemmer reads."""

    def __init__(self, folder: Path):
        self.db = sqlite3.connect(":memory:", check_same_thread=False)
        self.lock = Lock()
        self.db.execute(
            "CREATE VIRTUAL TABLE notes USING fts5(name UNINDEXED, text UNINDEXED, words, tokenize='porter')"
        )
        for path in sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in KINDS and p.is_file()):
            text = path.read_text(encoding="utf-8", errors="replace")
            row = (path.relative_to(folder).as_posix(), text, " ".join(words_of(f"{path.stem} {text}")))
            self.db.execute("INSERT INTO notes VALUES (?, ?, ?)", row)

    def search(self, words: dict[str, float]) -> list[tuple[str, str]]:
        """The names and texts of the best notes."""
        match = queries.fts5(words, columns=["words"])
        with self.lock:
            return self.db.execute(
                f"SELECT name, text FROM notes WHERE notes MATCH ? ORDER BY rank LIMIT {RESULTS}", (match,)
            ).fetchall()

    def found(self, expanded: ExpandedQuery) -> list[str]:
        """What an expanded query finds, to be read."""
        return [text for _, text in self.search(expanded.words())]


def excerpt(text: str, words: dict[str, float]) -> str:
    """A piece of a note around the heaviest of the words that it holds."""
    flat = " ".join(text.split())
    found = [at for word in sorted(words, key=lambda w: -words[w]) if (at := flat.lower().find(word)) >= 0]
    start = max(0, (found or [0])[0] - AROUND)
    return ("… " if start else "") + flat[start : start + 3 * AROUND]


class Page(BaseHTTPRequestHandler):
    def __init__(self, notes: Notes, expander: Expander, refine: bool, *arguments):
        self.notes, self.expander, self.refine = notes, expander, refine
        super().__init__(*arguments)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            self.send_error(400)  # a page from elsewhere, by a name of its own that leads here
        elif url.path == "/search":
            asked = parse_qs(url.query)
            found = self.search(asked.get("q", [""])[0], "expand" in asked, set(asked.get("without", [])))
            self.send(json.dumps(found).encode(), "application/json")
        elif url.path == "/":
            self.send((HERE / "page.html").read_bytes(), "text/html; charset=utf-8")
        else:
            self.send_error(404)

    def search(self, query: str, expand: bool, without: set[str]) -> dict:
        plain = ExpandedQuery(query, "", self.expander.spec.join)
        expanded = self.expanded(query) if expand and words_of(query) else plain
        words = {word: weight for word, weight in expanded.words().items() if word not in without}
        chips = [word for word in sorted(words, key=lambda w: -words[w]) if word not in plain.words()]
        results = [{"name": name, "text": excerpt(text, words)} for name, text in self.notes.search(words)]
        return {"results": results, "chips": chips[:CHIPS], "fallback": expanded.fallback}

    def expanded(self, query: str) -> ExpandedQuery:
        if self.refine:
            return self.expander.refine(query, self.notes.found, deadline_ms=DEADLINE_MS)
        return self.expander.expand(query, deadline_ms=DEADLINE_MS)

    def send(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    log_message = lambda *_: None  # noqa: E731


if __name__ == "__main__":
    parser = ArgumentParser(description="Search a folder of notes (.md, .txt) on this machine.")
    parser.add_argument(
        "folder", type=Path, nargs="?", default=HERE / "sample", help="of notes; ours if left out"
    )
    parser.add_argument("--model", default="builtin:smollm2-135m", help="the student (default: %(default)s)")
    parser.add_argument("--reader", help="an encoder's .gguf, to read what the student's text finds")
    parser.add_argument("--cache", default="notes-cache.db", help="keeps texts (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8018, help="to listen on (default: %(default)s)")
    asked = parser.parse_args()
    if not asked.folder.is_dir():
        parser.error(f"{asked.folder} is no folder")
    notes = Notes(asked.folder)
    count = notes.db.execute("SELECT count(*) FROM notes").fetchone()[0]
    if not count:
        parser.error(f"{asked.folder} holds no .md and no .txt file")
    try:
        expander = Expander.load(
            asked.model, reader=asked.reader, budget_tokens=48, parallel=4, cache=asked.cache
        )
        page = partial(Page, notes, expander, asked.reader is not None)
        server = ThreadingHTTPServer(("127.0.0.1", asked.port), page)
    except OSError as error:
        parser.error(f"port {asked.port}: {error.strerror}; --port takes another")
    except (QeEdgeError, OverflowError) as error:  # no such model; no such port
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130)
    print(f"http://127.0.0.1:{server.server_port}", flush=True)
    print(f"{count} notes of {asked.folder}, {asked.model}, cache {asked.cache}; Ctrl-C ends it", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()
