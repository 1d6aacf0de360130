"""How many threads a student should take beside other work: tokens/s by threads, waiting and load.

    python -m qe_edge.bench.programs.thread_speed

Each way runs in a process of its own, by turns, beside as many processes that do nothing but compute.
`spin` is how long a thread of GNU's OpenMP waits awake (GOMP_SPINCOUNT): 300,000 turns are OpenMP's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Annotated

import typer

from qe_edge.console import note
from qe_edge.runtime.expander import Expander
from qe_edge.student.gate import OPEN
from qe_edge.student.models import DEFAULT_STUDENT
from qe_edge.work.machine import SPIN, usable_cores

BUSY = (0, 1, 3)  # processes beside it
SPINS = ("300000", SPIN, "0")
FREE = -1  # as many threads as find a core free, which is the default


def main(
    model: Annotated[str, typer.Option()] = DEFAULT_STUDENT,
    seconds: Annotated[float, typer.Option(help="For each turn.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    child: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Print a table with a row for each way."""
    if child:
        print(_rate(model, None if child == FREE else child, seconds))
        return
    cores = usable_cores()
    counts = sorted({1, max(1, cores // 2), max(1, cores - 1), cores})
    ways = [(count, spin) for count in counts for spin in (SPINS if count > 1 else (SPIN,))]
    ways.append((FREE, SPIN))
    found: dict[tuple[int, str, int], list[float]] = defaultdict(list)
    for number in range(rounds):
        for busy in BUSY:
            note(f"round {number + 1}, beside {busy}")
            for threads, spin in ways:
                own = ["--model", model, "--seconds", str(seconds), "--child", str(threads)]
                with _load(busy):
                    done = subprocess.run(
                        [sys.executable, "-m", __spec__.name, *own],
                        env=os.environ | {"GOMP_SPINCOUNT": spin},
                        stdout=subprocess.PIPE,
                        text=True,
                        check=True,
                    )
                found[threads, spin, busy].append(float(done.stdout))
    print(f"{model}, {cores} cores, {rounds} rounds; tokens/s beside so many busy processes\n")
    print("| threads | spin |" + "".join(f" {busy} |" for busy in BUSY))
    print("| --: | --: |" + " --: |" * len(BUSY))
    for threads, spin in ways:
        rates = [median(found[threads, spin, busy]) for busy in BUSY]
        print(
            f"| {'free' if threads == FREE else threads} | {spin} |"
            + "".join(f" {rate:.1f} |" for rate in rates)
        )


def _rate(model: str, threads: int | None, seconds: float) -> float:
    """Tokens/s of greedy expansions, one at a time, prompt and all."""
    with Expander.load(model, threads=threads, gate=OPEN, budget_tokens=64) as expander:
        expander.expand("what causes tides")
        start, tokens, query = time.perf_counter(), 0, 0
        while time.perf_counter() - start < seconds:
            tokens += expander.expand(f"how does bread rise {query}").tokens
            query += 1
        return tokens / (time.perf_counter() - start)


@contextmanager
def _load(processes: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    typer.run(main)
