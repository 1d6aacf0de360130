"""One run of a command: its output folder, which can be resumed, and the `run.json` that tells how it was."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from qe_edge.console import is_main_process, json_bytes
from qe_edge.errors import BadArgument, BadInput
from qe_edge.redact import redact
from qe_edge.work.files import MANIFEST, claim, publish, read_json, recover, remove, sha256, write_json
from qe_edge.work.machine import machine, versions

SCHEMA_VERSION = 1


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


class RunFolder:
    """The output folder of work that can be resumed: `<out>.partial` until it is whole, then `out`.

    `work` matches the files that are worth resuming; a partial folder without any is simply replaced.

    Raises:
        BadArgument: an interrupted run with other settings, inputs or versions lies there, or another process
            is at work there.
    """

    work = "generated/*/*"

    def __init__(self, command: str, settings: dict[str, Any], inputs: dict[str, Path | str], out: Path):
        check_output(out, command)
        if is_main_process() and not claim(out):
            raise BadArgument(f"another command is writing {out}; wait for it, or choose another folder")
        self.out = out
        self.partial = out.with_name(out.name + ".partial")
        # Through JSON, so that it compares equal with the record of an earlier, interrupted run.
        self.record = msgspec.json.decode(json_bytes(run_record(command, settings, inputs)))
        self.record["state"] = "running"
        before = read_record(self.partial)
        if before.get("state") == "finished":  # an old output, which a killed process had just replaced
            remove(self.partial)
            before = {}
        compared = ("command", "settings", "inputs", "versions")
        if before and (other := [key for key in compared if before.get(key) != self.record[key]]):
            if any(self.partial.glob(self.work)):
                raise BadArgument(
                    f"{self.partial} holds an interrupted run with other {' and '.join(other)}; "
                    "run it again as it was to finish it, or delete that folder"
                )
            remove(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        write_json(self.partial / MANIFEST, self.record)

    def finish(self, **extra: Any) -> Path:
        """Complete the record and give the folder its name."""
        write_json(self.partial / MANIFEST, {**self.record, **extra, "state": "finished", "finished": now()})
        publish(self.partial, self.out)
        return self.out
