"""Expansions that were written before, in a SQLite file that several processes may share."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TypeVar

import msgspec

from qe_edge.arguments import check_number, check_path
from qe_edge.console import warn
from qe_edge.errors import BadArgument, BadInput
from qe_edge.work.files import sha256

T = TypeVar("T")
_TABLES = {"answers": ["key", "value", "used"], "models": ["file", "sha256"]}
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value BLOB NOT NULL, used REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON answers (used);
CREATE TABLE IF NOT EXISTS models (file TEXT PRIMARY KEY, sha256 TEXT NOT NULL);
"""


_MAGIC, _ID_AT = b"SQLite format 3\0", 68  # see https://www.sqlite.org/fileformat.html#application_id
_ID = 0x71656467  # "qedg": by it alone a file that can't be read is known to be a cache
WAIT = 1.0  # seconds for another process's transaction, of some milliseconds


class ExpansionCache:
    """Answers by key, those that were used last, up to `max_mb` million bytes.

    Args:
        path: the SQLite file, made if it isn't there. One file serves any number of models. A damaged one is
            set aside, as `<name>.damaged`, and made anew.

    Raises:
        BadInput: it is no SQLite file, or another program's.
    """

    def __init__(self, path: Path | str, *, max_mb: float = 64):
        check_number("max_mb", max_mb, 0, 1e9)
        check_path("cache", path)
        if str(path) == ":memory:":
            raise BadArgument(
                "a cache is a file: a database in memory holds nothing from one call to the next"
            )
        self.path, self._limit = Path(path), max_mb * 1e6
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._is_damaged():
            self._set_aside()
        with self._connected() as db:
            self._check_ours(db)
            with suppress(sqlite3.OperationalError):  # another process is just doing so
                if db.execute("PRAGMA application_id").fetchone() != (_ID,):
                    db.execute(f"PRAGMA application_id={_ID}")
                db.execute("PRAGMA journal_mode=WAL")  # readers don't wait for a writer
            db.executescript(_SCHEMA)

    def _check_ours(self, db: sqlite3.Connection) -> None:
        """Before anything is written: an app's own database is soon named by mistake."""
        tables = db.execute(
            "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' AND type != 'index'"
        )
        for (name,) in tables.fetchall():
            columns = [column for _, column, *_ in db.execute(f'PRAGMA table_info("{name}")')]
            if _TABLES.get(name) != columns:
                raise BadInput(
                    f"is another program's database, with a table {name!r}; give the cache a file of its own",
                    path=self.path,
                )

    def _is_damaged(self) -> bool:
        """Whether it is a cache that SQLite can't use; any other file is none of ours to move."""
        if not self.path.is_file():
            return False
        with self.path.open("rb") as file:
            header = file.read(_ID_AT + 4)
        if not header.startswith(_MAGIC) or header[_ID_AT:] != _ID.to_bytes(4, "big"):
            return False
        try:
            with self._connected() as db:
                return bool(db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",))
        except BadInput as error:
            return not _is_busy(error)

    def _set_aside(self) -> None:
        places = (self.path.with_name(f"{self.path.name}.damaged{n or ''}") for n in count())
        aside = next(place for place in places if not place.exists())
        warn(f"{self.path} is damaged; it is kept as {aside.name}, and a new cache is begun")
        for log in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + log).replace(aside.with_name(aside.name + log))

    @contextmanager
    def _connected(self, *, wait: float = WAIT) -> Iterator[sqlite3.Connection]:
        """A connection for one transaction: SQLite's own may not be shared by threads, nor by a fork."""
        if self.path.is_dir():
            raise BadInput("is a folder; a cache of expansions is a SQLite file", path=self.path)
        try:
            with closing(sqlite3.connect(self.path, timeout=wait)) as db, db:
                db.execute("PRAGMA synchronous=NORMAL")
                yield db
        except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter for a damaged name in its schema
            raise BadInput(
                f"can't be used as a cache of expansions, name another file: {error}", path=self.path
            ) from None

    def get(self, key: str, kind: type[T], *, wait: float = WAIT) -> T | None:
        """What was put under the key; None too for what another version wrote.

        Raises:
            BadInput: it can't be read, or another process held it for `wait` seconds.
        """
        with self._connected(wait=wait) as db:
            row = db.execute("SELECT value FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        # Nobody waits to say that it was used.
        with suppress(BadInput), self._connected(wait=0) as db:
            db.execute("UPDATE answers SET used = ? WHERE key = ?", (time.time(), key))
        try:
            return msgspec.json.decode(row[0], type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, TypeError):
            return None

    def put(self, key: str, value: object, *, wait: float = WAIT) -> None:
        """Keep a value, and drop those that weren't used for longest where there is no room.

        Raises:
            BadInput: as `get`.
        """
        content = msgspec.json.encode(value)
        with self._connected(wait=wait) as db:
            db.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", (key, content, time.time()))
            while _held(db) > self._limit:
                # A tenth at once, so that not every new answer has to delete an old one.
                dropped = db.execute(
                    "DELETE FROM answers WHERE key IN (SELECT key FROM answers ORDER BY used"
                    " LIMIT (SELECT 1 + count(*) / 10 FROM answers))"
                )
                if not dropped.rowcount:
                    break

    def digest(self, model: Path) -> str:
        """A model's SHA-256, computed once for each state of its files."""
        files = sorted(path for path in model.rglob("*") if path.is_file()) if model.is_dir() else [model]
        state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(msgspec.json.encode(state)).hexdigest()
        with self._connected() as db:
            row = db.execute("SELECT sha256 FROM models WHERE file = ?", (key,)).fetchone()
        if row and isinstance(row[0], str):
            return row[0]
        found = sha256(model)
        with self._connected() as db:
            db.execute("INSERT OR REPLACE INTO models VALUES (?, ?)", (key, found))
        return found


def _is_busy(error: BadInput) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _held(db: sqlite3.Connection) -> int:
    """Bytes of the file that hold something; what was deleted is used again."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return (pages - free) * size
