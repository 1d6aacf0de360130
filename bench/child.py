"""Work in a process of its own: its peak memory is its own, and if it crashes, nothing else does.

The child is `python -m qe_edge.bench.child MODULE FUNCTION`. It reads one task on stdin and prints one JSON
object, whatever engines print meanwhile; the types of both are those that the function is annotated with.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, get_type_hints

import msgspec

from qe_edge.console import json_bytes, prepare_streams, speaking, still_at_work
from qe_edge.errors import DEBUG, QeEdgeError, explained

A = TypeVar("A")


class Died(QeEdgeError):
    """The child ended without a word, as one does that crashed or was killed."""


class _Reply(msgspec.Struct):
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    exit_code: int = 0


def in_child(work: Callable[[Any], A], task: Any, *, what: str) -> A:
    """What a module's function returns for a task, run in a child; `what` it does is for errors.

    Raises:
        QeEdgeError: it failed, with the exit code that the error had in the child.
        Died: it didn't live to say so.
    """
    spec = sys.modules[work.__module__].__spec__
    assert spec  # a program's own module, too, has its full name there
    command = [sys.executable, "-P", "-m", "qe_edge.bench.child", spec.name, work.__name__]
    # The standard library's JSON keeps names of files that are no text.
    asked = json.dumps(msgspec.to_builtins(task)).encode()
    with speaking():
        child = subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=False)
    try:
        reply = msgspec.json.decode(child.stdout, type=_Reply)
    except msgspec.MsgspecError:
        raise Died(f"the process {what} died (exit code {child.returncode})") from None
    if reply.error:
        error = QeEdgeError(reply.error)
        error.exit_code = reply.exit_code
        raise error
    return msgspec.json.decode(reply.value, type=get_type_hints(work)["return"])


def _main() -> None:
    prepare_streams()
    stdout = os.dup(1)
    os.dup2(2, 1)  # engines print; the reply alone goes to stdout
    reply: dict[str, Any]
    try:
        work = getattr(import_module(sys.argv[1]), sys.argv[2])
        kind = next(iter(get_type_hints(work).values()))
        task = msgspec.convert(json.loads(sys.stdin.buffer.read()), kind, str_keys=True)
        with still_at_work("bench"):
            reply = {"value": work(task)}
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        code = error.exit_code if isinstance(error, QeEdgeError) else QeEdgeError.exit_code
        reply = {"error": explained(error), "exit_code": code}
    with os.fdopen(stdout, "wb") as answer:
        answer.write(json_bytes(reply))


if __name__ == "__main__":
    _main()
