"""One run of a command: its output folder, which can be resumed, and the `run.json` that tells how it was."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import is_main_process, json_bytes, warn
from qe_edge.errors import BadArgument, BadInput
from qe_edge.redact import redact
from qe_edge.work.files import (
    MANIFEST,
    claim,
    publish,
    read_json,
    recover,
    release,
    remove,
    sha256,
    write_json,
)
from qe_edge.work.folder import is_numbered
from qe_edge.work.machine import machine, versions

SCHEMA_VERSION = 1
# What must be the same for an interrupted run to be resumed.
COMPARED = ("command", "settings", "inputs", "versions")


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
            name: {
                "path": _absolute(path),
                "sha256": sha256(path) if Path(path).exists() else None,
                "bytes": Path(path).stat().st_size if Path(path).is_file() else None,
            }
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


def learnt_by(folder: Path) -> dict[str, list[str]]:
    """The data sets that a folder's student `learnt` from, by its record, for that of what is made of it."""
    record = read_record(folder)
    return {"learnt": record["learnt"]} if "learnt" in record else {}


def check_output(out: Path, command: str, inputs: Iterable[Path | str] = ()) -> None:
    """Fail before the work, not after it, when the output folder can't be written or must not be replaced.

    A folder is replaced whole: it must be new, empty, or an earlier output of the same command, which is
    told. `teach` adds to what there is. No input may lie in it, which would be replaced with it.
    """
    check_place(out)
    if not out.is_dir():
        return
    if command != "teach":
        check_not_here(out)
    if all(is_litter(path) for path in out.iterdir()):
        return
    place = out.resolve()
    for path in inputs:
        if place in (found := Path(path).resolve(), *found.parents) and found.exists():
            raise BadArgument(f"{out} holds an input, {path}, and would be replaced; choose a new folder")
    if read_record(out).get("command") != command:
        raise BadArgument(f"{out} holds something other than `qe-edge {command}` made; choose a new folder")
    if command != "teach":
        warn(f"{out} holds an earlier output of `qe-edge {command}`, which this one replaces as a whole")


def check_not_here(out: Path) -> None:
    """Refuse to replace the current folder, or one that it lies in: the shell would be in a deleted one."""
    if Path.cwd().is_relative_to(out.resolve()):
        raise BadArgument(f"{out.resolve()} is where you are, and can't be replaced; name another folder")


def check_place(out: Path) -> None:
    """Fail before the work where no output folder can be written."""
    recover(out.resolve())
    existing = out.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise BadArgument(f"{existing} is a file, so {out} can't be made there; choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise BadArgument(
            f"{existing} is not writable; choose another --workdir, or --out where there is one"
        )


def _partial(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def is_litter(path: Path) -> bool:
    """What a killed process of ours leaves: a lock, a half-written file, a JSON Lines file without a line."""
    if not path.is_file():
        return False
    without_line = path.name.endswith((".jsonl", ".jsonl.lock")) and not path.stat().st_size
    return without_line or bool(re.fullmatch(r"\..+\.(lock|\d{1,7}\.partial)", path.name))


def _check_ours(partial: Path) -> None:
    """Refuse to delete what is no half-written output of ours, but has its name."""
    if partial.is_file() or (
        partial.is_dir()
        and not (partial / MANIFEST).is_file()
        and any(not path.name.startswith(".") for path in partial.iterdir())
    ):
        raise BadArgument(f"{partial} holds something other than a half-written output; move it away")


def _next(out: Path) -> Path:
    return out.with_name(f"{int(out.name) + 1:03d}")


def _mine(out: Path) -> bool:
    """Whether this process has the folder, or gets it; of several of one training, the main one asks."""
    return not is_main_process() or claim(out)


class RunFolder:
    """The output folder of work that can be resumed: `<out>.partial` until it is whole, then `out`.

    `work` matches the files that are worth resuming; a partial folder without any is simply replaced. Where
    another run's work lies at a work folder's number, this run takes the next free one. Work of the same run
    that lies at another number is brought to this one's, and resumed.

    Raises:
        BadArgument: `out` is no number of a work folder, and an interrupted run of another command, or with
            other settings, inputs or versions, lies there; another process is at work there; or
            `check_output` refuses it.
    """

    work = "generated/*/*"

    def __init__(self, command: str, settings: dict[str, Any], inputs: dict[str, Path | str], out: Path):
        # Through JSON, so that it compares equal with the record of an earlier, interrupted run.
        self.record = msgspec.json.decode(json_bytes(run_record(command, settings, inputs)))
        self.record["state"] = "running"
        if out.is_symlink():
            out = out.resolve()  # what it leads to is replaced, not the link
        if is_numbered(out):
            out = self._place(out)
        check_output(out, command, inputs.values())
        if not _mine(out):
            raise BadArgument(f"another command is writing {out}; wait for it, or choose another folder")
        self.out, self.partial = out, _partial(out)
        if other := self._other_work(out):
            raise BadArgument(
                f"{self.partial} holds an unfinished run with other {other}; "
                "run it again as it was to finish it, or delete that folder"
            )
        if not self._is_same(self.partial):
            _check_ours(self.partial)
            remove(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / MANIFEST, self.record)

    def _place(self, out: Path) -> Path:
        """A work folder's number, `out` or the next free one, with what the same run left at another."""
        while other := self._other_work(out):
            warn(f"{_partial(out)} holds an unfinished run with other {other}; it stays there")
            release(out)  # for that run, which may go on beside this one
            out = _next(out)
            while out.exists() or not _mine(out):
                out = _next(out)
        if is_main_process() and not self._is_same(_partial(out)):
            for partial in sorted(out.parent.glob("*.partial")):
                place = partial.with_suffix("")
                if is_numbered(place) and self._is_same(partial) and _mine(place):
                    remove(_partial(out))
                    partial.rename(_partial(out))
                    break
        return out

    def _other_work(self, out: Path) -> str:
        """In what an interrupted run there differs from this one, if it has work that is worth keeping."""
        before = read_record(_partial(out))
        # An old output, which a killed process had just replaced, is finished.
        if not before or before.get("state") == "finished":
            return ""
        # What another command's work is, this one doesn't know.
        command = self.record["command"]
        if before.get("command", command) == command and not any(_partial(out).glob(self.work)):
            return ""
        return " and ".join(key for key in COMPARED if before.get(key) != self.record[key])

    def _is_same(self, partial: Path) -> bool:
        """Whether the folder holds this run, interrupted."""
        before = read_record(partial)
        return all(before.get(key) == self.record[key] for key in (*COMPARED, "state"))

    def finish(self, **extra: Any) -> Path:
        """Complete the record and give the folder its name."""
        write_json(self.partial / MANIFEST, {**self.record, **extra, "state": "finished", "finished": now()})
        publish(self.partial, self.out)
        return self.out
