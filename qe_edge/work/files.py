"""Outputs that appear whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from qe_edge.console import json_bytes
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.work.exchange import exchange

MANIFEST = "run.json"


@contextmanager
def atomic_path(target: Path | str) -> Iterator[Path]:
    """Yield a path beside `target` to write a file or folder to; on success it becomes `target`.

    On any error, a full disk and Ctrl-C included, the half-written output is removed and an
    existing `target` stays as it was.
    """
    target = Path(target).resolve()
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        yield partial
        publish(partial, target)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        full = "Free some space, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose"
        raise QeEdgeError(
            f"cannot write {target}: {error.strerror or error}; nothing was changed there. "
            f"{full} another folder with --workdir, or with --out where there is one."
        ) from error
    finally:
        remove(partial)


def recover(target: Path) -> None:
    """Put right what killed processes left of `target`: its old state if it is gone, nothing half-written."""
    import psutil

    # A process's number has seven digits at most; a date, as people put into names, has eight.
    ours = re.compile(rf"\.{re.escape(target.name)}\.(\d{{1,7}})\.(partial|old)")
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        found = ours.fullmatch(leftover.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            with suppress(OSError):  # somebody else just did
                leftover.rename(target)
        else:
            remove(leftover)


def recover_all(folder: Path) -> None:
    """`recover` every numbered output of a folder that a killed process was replacing."""
    for leftover in folder.glob(".*.old"):
        if found := re.fullmatch(r"\.(\d+)\.\d+\.old", leftover.name):
            recover(folder / found[1])


_CLAIMED: dict[Path, BaseFileLock] = {}


def claim(out: Path) -> bool:
    """Keep an output folder for this process until it ends, however that is; False if another one has it."""
    place = out.resolve()
    if place not in _CLAIMED:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f".{place.name}.lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        _CLAIMED[place] = lock
    return True


def release(out: Path) -> None:
    """Give up what `claim` got, so that another process can have it."""
    if lock := _CLAIMED.pop(out.resolve(), None):
        lock.release()


def publish(partial: Path, target: Path) -> None:
    """Flush `partial` to disk and give it the name `target`.

    An old `target` is replaced in one step, or is found again by `recover` if the process is killed.

    Raises:
        BadArgument: a file would take the place of a folder with all that it holds, or the other way round.
    """
    if target.exists() and target.is_dir() != partial.is_dir():
        kinds = ("a folder", "a file in it") if target.is_dir() else ("a file", "a folder")
        raise BadArgument(f"{target} is {kinds[0]}, and stays as it is; name {kinds[1]}")
    for path in (partial, *partial.rglob("*")):
        if path.is_file() or path.is_dir():
            _flush(path)
    if not target.exists() or target.is_file():
        partial.replace(target)
    else:  # nothing can be renamed over a folder
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if exchange(partial, target):
            partial.rename(old)
        else:
            target.rename(old)
            try:
                partial.rename(target)
            except OSError:
                old.rename(target)
                raise
        remove(old)
    _flush(target.parent)


def _flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete a file or a folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # it is not there, or neither is its folder
            path.unlink()


def write_bytes(target: Path | str, content: bytes) -> None:
    """Write a file whole or not at all."""
    with atomic_path(target) as path:
        path.write_bytes(content)


def write_json(target: Path | str, value: Any) -> None:
    """Write any JSON value, indented, whole or not at all."""
    write_bytes(target, msgspec.json.format(json_bytes(value), indent=2) + b"\n")


def size_of(path: Path) -> int:
    """The bytes of a file, or of all in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files)


def near(path: Path) -> Path:
    """A path as it is shortest to read: from the current folder, where it lies below that."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def sha256(path: Path | str) -> str:
    """SHA-256 of a file; of a folder, of the sorted list of its files' names and digests."""
    path = Path(path)
    if path.is_dir():
        listing = "".join(
            f"{sha256(p)}  {p.relative_to(path).as_posix()}\n"
            for p in sorted(path.rglob("*"))
            if p.is_file() and p.name != MANIFEST
        )
        return hashlib.sha256(listing.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours or of a model folder."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise BadInput("no such file", path=path) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a JSON object: {error}", path=path) from None
