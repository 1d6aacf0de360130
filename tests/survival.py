"""What survives: folders of killed writers, threads beside a close or an end, short queries beside long ones.

    python tests/survival.py builtin:smollm2-135m

Each fault ends a process of its own. `docs/reliability.md` has the figures, the tests a few of each.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Annotated

import typer

from qe_edge.console import note
from qe_edge.runtime.expander import Expander
from qe_edge.student.gate import OPEN
from qe_edge.student.models import resolve
from qe_edge.work.files import recover

WAYS = ("in one step", "by two renames")  # in which a folder takes another one's place
LONGEST = 120.0  # seconds for a process; one that hangs counts as failed
LONG = [f"{i} " + "what causes the tides of the sea and why " * 24 for i in range(3)]
SHORT = [f"what causes tides {i}" for i in range(10)]

# Arguments: the folder, one of WAYS.
REPLACING = """
import sys
from itertools import count
from pathlib import Path
from qe_edge.work import files

if sys.argv[2] == "by two renames":
    files.exchange = lambda one, other: False
for number in count():
    with files.atomic_path(sys.argv[1]) as partial:
        partial.mkdir()
        for name in ("a.txt", "b.txt"):
            (partial / name).write_text(str(number))
    print(number, flush=True)
"""

# Arguments: a model, its engine, one of the calls or "all".
CLOSED_BESIDE = """
import sys, threading, time
from qe_edge import Expander, QeEdgeError
from qe_edge.student.gate import OPEN

model, engine, what = sys.argv[1:]
passages = [f"the moon pulls the sea {i}" for i in range(20)]
calls = {
    "feedback": lambda e: e.feedback("what causes tides", passages),
    "tokenize": lambda e: e.backend.tokenize("what causes tides " * 50, False),
    "detokenize": lambda e: e.backend.detokenize([5] * 500),
    "expand": lambda e: e.expand("what causes tides"),
    "stream": lambda e: list(e.stream("what causes tides")),
}
chosen = list(calls.values()) if what == "all" else [calls[what]]
for turn in range(4 if engine == "llama.cpp" else 2):
    expander = Expander.load(model, engine=engine, gate=OPEN, budget_tokens=16, parallel=4)
    ended, wrong = [], []

    def use(number):
        try:
            while True:
                chosen[number % len(chosen)](expander)
        except QeEdgeError as error:
            ended.append(str(error))
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.05 + 0.05 * turn)
    expander.close()
    for thread in threads:
        thread.join(30)
    assert not wrong, wrong
    assert ended == ["the model was closed; load it again"] * 6, ended
    expander.close()
print("done")
"""

# Arguments: a GGUF, and what its daemon threads do.
LEFT_BEHIND = """
import sys, threading, time
from qe_edge import Expander
from qe_edge.student.gate import OPEN

expander = Expander.load(sys.argv[1], gate=OPEN, budget_tokens=400)
passages = [f"the moon pulls the sea {i}" for i in range(20)]

def forever():
    while True:
        if sys.argv[2] == "expand":
            expander.expand("what causes tides")
        else:
            expander.feedback("what causes tides", passages)

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.3)
print("done")
"""


def main(
    model: Annotated[str, typer.Argument(help="A GGUF file or builtin:NAME.")],
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Of each fault.")] = 15,
    kills: Annotated[int, typer.Option(min=1, max=10_000, help="Of each way to replace a folder.")] = 150,
) -> None:
    """Print a row for each kind of fault: how often it was tried, how often something was lost."""
    source = resolve(model).source
    print("| what | tried | failed | |")
    print("| :-- | --: | --: | :-- |")
    for way in WAYS:
        broken, gone = replaced(way, kills)
        _row(f"a folder replaced {way}, kill -9", kills, broken, f"{gone} not there until the next look")
    _row("close() beside six threads", rounds, failures(rounds, CLOSED_BESIDE, source, "llama.cpp", "all"))
    for what in ("expand", "feedback"):
        failed = failures(rounds, LEFT_BEHIND, source, what)
        _row(f"the interpreter ends beside threads in {what}", rounds, failed)
    alone, beside = fairness(source)
    _row("ten short queries beside three long ones", 1, 0, f"p50 {beside:.1f} s, alone {alone:.1f} s")


def _row(what: str, tried: int, failed: int, more: str = "") -> None:
    print(f"| {what} | {tried} | {failed} | {more} |", flush=True)


def replaced(way: str, kills: int) -> tuple[int, int]:
    """Kill a process that replaces a folder all the time, each time at another moment.

    Returns how often the folder was not whole, and how often it had to be put back first.
    """
    broken = gone = 0
    chance = random.Random(0)
    with TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        for _ in range(kills):
            process = subprocess.Popen(
                [sys.executable, "-c", REPLACING, str(out), way], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout
            process.stdout.readline()
            time.sleep(chance.uniform(0, 0.05))
            process.kill()
            process.communicate()
            if not out.exists():
                gone += 1
                recover(out)
            broken += not is_whole(out)
    return broken, gone


def is_whole(out: Path) -> bool:
    """Whether both files are there, from the same round."""
    found = {file.name: file.read_text() for file in out.iterdir()} if out.is_dir() else {}
    return set(found) == {"a.txt", "b.txt"} and len(set(found.values())) == 1


def failures(rounds: int, code: str, *arguments: str) -> int:
    """How many of so many processes did not end well."""
    failed = 0
    for _ in range(rounds):
        try:
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments],
                capture_output=True, text=True, timeout=LONGEST, check=False,
            )  # fmt: skip
            if (done.returncode, done.stdout) == (0, "done\n"):
                continue
            note(f"code {done.returncode}: {done.stderr[-300:]}")
        except subprocess.TimeoutExpired:
            note(f"hung for {LONGEST:g} s")
        failed += 1
    return failed


def fairness(model: str) -> tuple[float, float]:
    """Median seconds of ten short queries, four decoded together: alone, and behind three long ones."""
    with Expander.load(model, parallel=4, gate=OPEN, budget_tokens=48) as expander:
        list(expander.expand_many(["warm", "up"], parallel=4))
        return _median(expander, SHORT), _median(expander, [*LONG, *SHORT])


def _median(expander: Expander, queries: list[str]) -> float:
    seconds: dict[str, float] = {}

    def ask(query: str) -> None:
        begin = time.perf_counter()
        expander.expand(query)
        seconds[query] = time.perf_counter() - begin

    threads = [Thread(target=ask, args=(query,)) for query in queries]
    for thread in threads:
        thread.start()
        time.sleep(0.005)  # in this order
    for thread in threads:
        thread.join()
    return statistics.median(seconds[query] for query in SHORT)


if __name__ == "__main__":
    typer.run(main)
