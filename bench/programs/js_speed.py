"""A student in Node beside the same one in Python: cold start, and queries per second one at a time.

    python -m qe_edge.bench.programs.js_speed STUDENT.gguf

Both in processes of their own, by turns, on llama.cpp (node-llama-cpp's build and llama-cpp-python's) with as
many threads, greedily up to the same budget. It needs a checkout: js/ after `npm install` there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from qe_edge.console import note
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.runtime.expander import Expander

JS = Path(__file__).resolve().parents[2] / "js"


def main(
    model: Annotated[Path, typer.Argument(help="A student's GGUF.")],
    queries: Annotated[int, typer.Option(min=2)] = 20,
    tokens: Annotated[int, typer.Option(min=1)] = 24,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print a table with a row for each language."""
    if child:
        print(_python(model, json.loads(child.read_text(encoding="utf-8")), threads, tokens))
        return
    asked = list(load_dataset("demo-en").queries.values())[:queries]
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "queries.json"
        file.write_text(json.dumps(asked), encoding="utf-8")
        own = [str(model.resolve()), "--threads", str(threads), "--tokens", str(tokens), "--child", str(file)]
        node = [str(Path(sys.executable).parent / "node"), str(JS / "test" / "speed.mjs")]
        ways = {
            "Python": [sys.executable, "-m", __spec__.name, *own],
            "Node": [*node, str(model.resolve()), str(file), str(threads), str(tokens)],
        }
        found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, command in ways.items():
                note(f"round {number + 1}: {way}")
                start = time.perf_counter()
                done = subprocess.run(command, cwd=JS, stdout=subprocess.PIPE, text=True, check=True)
                rest = float(done.stdout.splitlines()[-1])
                found[way].append((time.perf_counter() - start - rest, rest))
    print(f"{model.name}, {len(asked)} queries, {tokens} tokens, {threads} threads, {rounds} rounds\n")
    print("| | the process with its first query, s | queries/s after it |")
    print("| :-- | --: | --: |")
    for way, turns in found.items():
        cold, rest = (median(times) for times in zip(*turns, strict=True))
        print(f"| {way} | {cold:.2f} | {(len(asked) - 1) / rest:.2f} |")


def _python(model: Path, asked: list[str], threads: int, tokens: int) -> float:
    """Seconds for all queries but the first."""
    with Expander.load(model, threads=threads, budget_tokens=tokens) as expander:
        expander.expand(asked[0])
        start = time.perf_counter()
        for query in asked[1:]:
            expander.expand(query).to_fts5()
        return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
