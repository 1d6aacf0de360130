"""How fast a student's files read and write: tokens per second, in turns, as shares of the first one's.

    python -m qe_edge.bench.programs.file_speed WHOLE.gguf PRUNED.gguf --threads 1 --threads 2 --plain

Every file gets the same token ids (of the smallest vocabulary), each turn in a process of its own: PROMPT
tokens together, then ANSWER one at a time. `--plain` adds each file with its weights as they lie in it, where
llama.cpp would lay them out anew for the processor.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Annotated

import msgspec
import typer

from qe_edge.bench.child import in_child
from qe_edge.console import progress
from qe_edge.work.machine import usable_cores

PROMPT, ANSWER = 96, 64


class Task(msgspec.Struct, frozen=True):
    """What a child process measures; `repack` is `LlamaModel`'s."""

    file: str
    threads: int
    repack: bool | None


def main(
    files: Annotated[list[Path], typer.Argument(help="GGUFs of students; the first is the reference.")],
    threads: Annotated[list[int] | None, typer.Option(help="Repeat it (default: all cores).")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Also without another layout of weights.")] = False,
    turns: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Print a table."""
    ways = [(file, repack) for file in files for repack in ((False, None) if plain else (None,))]
    counts = threads or [usable_cores()]
    speeds: dict[tuple[Path, bool | None, int], list[tuple[float, float]]] = {}
    with progress("measuring", turns * len(ways) * len(counts)) as advance:
        for _ in range(turns):
            for count in counts:
                for file, repack in ways:
                    found = in_child(measure, Task(str(file), count, repack), what=f"of {file.name}")
                    speeds.setdefault((file, repack, count), []).append(found)
                    advance()
    print("| file | MB | threads | reads, tokens/s | writes | reads, of the first | writes |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for (file, repack, count), turn in speeds.items():
        first = speeds[ways[0][0], ways[0][1], count]
        reads, writes = (median(speed[i] for speed in turn) for i in (0, 1))
        shares = [median(a[i] / b[i] for a, b in zip(turn, first, strict=True)) for i in (0, 1)]
        name = f"{file.parent.name}/{file.name}{' as it lies' if repack is False else ''}"
        print(
            f"| {name} | {file.stat().st_size / 1e6:.0f} | {count} | {reads:.0f} | {writes:.1f} "
            f"| {shares[0]:.2f} | {shares[1]:.2f} |"
        )


def measure(task: Task) -> tuple[float, float]:
    """Tokens per second that are read and written, after one round that doesn't count."""
    from qe_edge.backends.llama_batch import LlamaBatch
    from qe_edge.backends.llama_model import LlamaModel

    model = LlamaModel(Path(task.file), threads=task.threads, longest=512, repack=task.repack)
    batch = LlamaBatch(model, 1)
    prompt = [7919 * i % 900 + 50 for i in range(PROMPT)]
    for _ in range(2):
        batch.clear()
        start = time.perf_counter()
        batch.add(prompt, prefix=0, answer=ANSWER)
        batch.step()
        read = time.perf_counter()
        for _ in range(ANSWER):
            batch.step()
        written = time.perf_counter()
    return PROMPT / (read - start), ANSWER / (written - read)


if __name__ == "__main__":
    typer.run(main)
