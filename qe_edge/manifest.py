"""Outputs that appear whole or not at all, and the `run.json` that says how each one was made."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from filelock import BaseFileLock, FileLock, Timeout

from qe_edge.console import json_bytes
from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.exchange import exchange
from qe_edge.redact import redact

MANIFEST = "run.json"
SCHEMA_VERSION = 1
# Reported when installed; looked up by distribution name so that nothing heavy is imported.
_PACKAGES = (
    *(
        "qe-edge",
        "bm25s",
        "ir-measures",
        "PyStemmer",
        "jieba",
        "numpy",
        "torch",
        "transformers",
        "trl",
        "peft",
        "datasets",
    ),
    *("gguf", "llama-cpp-python", "mlx", "mlx-lm"),
)


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
        raise QeEdgeError(
            f"cannot write {target}: {error.strerror or error}; nothing was changed there. "
            "Free some space or choose another folder with --out or --workdir."
        ) from error
    finally:
        remove(partial)


def recover(target: Path) -> None:
    """Put right what killed processes left of `target`: its old state if it is gone, nothing half-written."""
    import psutil

    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*"):
        found = re.fullmatch(r".*\.(\d+)\.(partial|old)", leftover.name)
        if not found or psutil.pid_exists(int(found[1])):
            continue
        if found[2] == "old" and not target.exists():
            with suppress(OSError):  # somebody else just did
                leftover.rename(target)
        else:
            remove(leftover)


def recover_all(folder: Path) -> None:
    """`recover` every output of a folder that a killed process was replacing."""
    for leftover in folder.glob(".*.old"):
        if found := re.fullmatch(r"\.(.+)\.\d+\.old", leftover.name):
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


def publish(partial: Path, target: Path) -> None:
    """Flush `partial` to disk and give it the name `target`.

    An old `target` is replaced in one step, or is found again by `recover` if the process is killed.
    """
    for path in (partial, *partial.rglob("*")):
        if path.is_file() or path.is_dir():
            _flush(path)
    if not target.exists() or (target.is_file() and partial.is_file()):
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


def versions() -> dict[str, str]:
    """The installed versions of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cpu_name() -> str:
    """The processor's marketing name where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What the figures of a run were measured on. No host or user name."""
    import psutil

    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def run_record(
    command: str, settings: dict[str, Any], inputs: dict[str, Path | str], **extra: Any
) -> dict[str, Any]:
    """The content of `run.json`: what was run, on what, with what, and from which inputs."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "argv": redact(sys.argv[1:]),
        "settings": redact(settings),
        "inputs": {
            name: {"path": _absolute(path), "sha256": sha256(path) if Path(path).exists() else None}
            for name, path in inputs.items()
        },
        "versions": versions(),
        "machine": machine(),
        "finished": now(),
        **extra,
    }


def _absolute(path: Path | str) -> str:
    """Of what exists, so that it is found from any folder; a hub id or a built-in as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of ours or of a model folder."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise BadInput("no such file", path=path) from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a JSON object: {error}", path=path) from None


def read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of an output folder; empty when it has none.

    Raises:
        BadInput: it is damaged, or another version's.
    """
    path = folder / MANIFEST
    record = read_json(path) if path.is_file() else {}
    if record.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise BadInput(f"of version {record['schema_version']!r}; update qe-edge", path=path)
    return record


def check_output(out: Path, command: str) -> None:
    """Fail before the work, not after it, when the output folder can't be written or must not be replaced.

    A folder is replaced whole: it must be new, empty, or an earlier output of the same command.
    """
    recover(out.resolve())
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise BadArgument(f"{existing} is a file, so {out} can't be made there; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadArgument(f"{existing} is not writable; choose another folder with --out or --workdir")
    if out.is_dir() and any(out.iterdir()) and read_record(out).get("command") != command:
        raise BadArgument(f"{out} holds something other than `qe-edge {command}` made; choose a new folder")
