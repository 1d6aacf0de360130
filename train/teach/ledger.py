"""The file a teacher's answers go to: append-only, one line each, safe against kill -9 at any moment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, TypeVar

import msgspec
from filelock import FileLock, Timeout

from qe_edge.console import note, warn
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.records import Expansion, read_jsonl

SYNC_EVERY = 1.0  # seconds; what a power cut can lose, unlike a kill


class Row(Protocol):
    """What every kind of line has: `key` stands for all that decided the answer."""

    @property
    def key(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def problem(self) -> str | None: ...
    @property
    def prompt_tokens(self) -> int | None: ...
    @property
    def completion_tokens(self) -> int | None: ...


R = TypeVar("R", bound=Row)


def read_texts(paths: Iterable[Path | str]) -> list[Expansion]:
    """The rows of files of expansions; a file that `teach` is still adding to is warned of.

    Raises:
        BadInput: there are none.
    """
    files, rows = list(paths), list[Expansion]()
    for path in files:
        if _is_written(path):
            warn(f"`qe-edge teach` is still adding to {path}: what it holds now is taken")
        rows += read_jsonl(path, Expansion)
    if not rows:
        raise BadInput(
            "no expansion is there; `qe-edge teach` asks for them", path=", ".join(map(str, files))
        )
    return rows


def _is_written(path: Path | str) -> bool:
    lock = FileLock(f"{path}.lock", timeout=0)
    if not Path(lock.lock_file).is_file():
        return False
    try:
        with lock:
            return False
    except Timeout:
        return True
    except OSError:  # a folder that can't be written to
        return False


class Ledger(Generic[R]):
    """Every answer ever got, by its key. One process at a time writes it: a `command` that asks for `what`.

    Raises:
        QeEdgeError: another process is writing it.
        BadInput: a line other than a torn last one is damaged.
    """

    def __init__(self, path: Path, kind: type[R], command: str, what: str):
        self.path, self.command, self.what = path, command, what
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(str(path) + ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise QeEdgeError(
                f"another `qe-edge {command}` is writing {path}; let it finish or stop it"
            ) from None
        self.keys: set[str] = set()
        self.tokens: dict[str, tuple[int, int]] = {}  # by model: of prompts, of answers
        try:
            self._mend_last_line(kind)
            if path.exists():
                for row in read_jsonl(path, kind):  # type: ignore[type-var]
                    self.count(row)
            self._file = path.open("ab", buffering=0)
        except BaseException:
            self._lock.release()
            raise
        self._synced = time.monotonic()

    def _mend_last_line(self, kind: type[R]) -> None:
        """A process killed while writing leaves a line without its end: that candidate is asked for again.

        A whole row, as an editor may leave one, is given its end; what is no row of ours stays as it is.
        """
        if not self.path.exists():
            return
        with self.path.open("r+b") as file:
            content_end = file.seek(0, os.SEEK_END)
            position = content_end
            while position > 0:  # back to the last line end, a block at a time
                start = max(0, position - 4096)
                file.seek(start)
                newline = file.read(position - start).rfind(b"\n")
                if newline >= 0:
                    position = start + newline + 1
                    break
                position = start
            if position == content_end:
                return
            file.seek(position)
            line = file.read()
            first = msgspec.structs.fields(kind)[0]  # type: ignore[arg-type]
            begin = b'{"' + first.encode_name.encode() + b'":'
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                msgspec.json.decode(line, type=kind)
                file.write(b"\n")
                return
            if not line.startswith(begin[: len(line)]):
                raise BadInput(f"its last line is none that `qe-edge {self.command}` wrote", path=self.path)
            file.truncate(position)
            note(f"{self.path}: dropped an unfinished last line")

    def count(self, row: R) -> None:
        if row.key:
            self.keys.add(row.key)
        prompt, completion = self.tokens.get(row.model, (0, 0))
        self.tokens[row.model] = (
            prompt + (row.prompt_tokens or 0),
            completion + (row.completion_tokens or 0),
        )

    def append(self, row: R) -> None:
        """Write a row: in the operating system's hands when this returns.

        Raises:
            OSError: it could not be written; the file ends with a whole line all the same.
        """
        line = memoryview(msgspec.json.encode(row) + b"\n")
        whole = self._file.tell()
        try:
            while line:  # an unbuffered write may take less than all
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(whole)
            self._file.seek(whole)
            raise
        self.count(row)
        if time.monotonic() - self._synced > SYNC_EVERY:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file.fileno())
        empty = not self._file.tell()
        self._file.close()
        if empty:
            self.path.unlink()
        self._lock.release()
