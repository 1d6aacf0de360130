"""What decoding many queries together brings: queries per second of one student, each way in turns.

    python -m qe_edge.bench.programs.runtime_speed MODEL.gguf --queries FILE

The reference is the loop that everybody writes first: `llama_cpp.Llama.__call__`, query after query. Every
way gets the same prompts and writes greedily up to the same budget, on the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from qe_edge.backends.amx import kept_off_amx, may_repack
from qe_edge.backends.gguf_check import check_gguf
from qe_edge.backends.llama_model import THREAD
from qe_edge.console import note
from qe_edge.errors import require
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.runtime.expander import Expander
from qe_edge.student.gate import OPEN
from qe_edge.work.files import write_json
from qe_edge.work.machine import usable_cores

FIRST = 10  # queries whose first token is timed
Way = Callable[[list[str]], int]
"""Expands queries; returns how many tokens were written."""


def main(
    model: Annotated[Path, typer.Argument(help="A student's GGUF.")],
    dataset: Annotated[str, typer.Option("--dataset", "-d", help="Whose queries are expanded.")] = "demo-en",
    queries: Annotated[int, typer.Option(min=1, help="How many, from the start again if need be.")] = 64,
    parallel: Annotated[
        list[int] | None, typer.Option(help="Queries at a time (default: 4, 8, 16, 32).")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all that was measured to this JSON file.")] = None,
) -> None:
    """Print a table with a row for each way."""
    threads = threads or usable_cores()
    known = list(load_dataset(dataset).queries.values())
    asked = [known[i % len(known)] for i in range(queries)]
    with Expander.load(model, threads=threads, gate=OPEN) as expander:
        ways = {"llama_cpp.Llama": _llama(model, threads, expander), "expand": _one_by_one(expander)}
        sizes = parallel or [4, 8, 16, 32]
        loaded = {n: Expander.load(model, threads=threads, gate=OPEN) for n in sizes}
        ways |= {f"expand_many, {n} at a time": _together(loaded[n], n) for n in sizes}
        turns: dict[str, list[tuple[float, int]]] = {way: [] for way in ways}
        for number in range(rounds):
            for name, way in ways.items():
                note(f"round {number + 1}: {name}")
                way(asked[:1])  # what is loaded or computed once
                start = time.perf_counter()
                tokens = way(asked)
                turns[name].append((time.perf_counter() - start, tokens))
    print(f"{model.name}, {queries} queries of {dataset}, {threads} threads, {rounds} rounds\n")
    print("| way | tokens a query | queries/s | tokens/s | times the loop |")
    print("| :-- | --: | --: | --: | --: |")
    loop = turns["llama_cpp.Llama"]
    for name, found in turns.items():
        seconds, tokens = median(s for s, _ in found), found[0][1]
        times = median(base / own for (own, _), (base, _) in zip(found, loop, strict=True))
        print(
            f"| {name} | {tokens / queries:.1f} | {queries / seconds:.2f} | {tokens / seconds:.0f} "
            f"| {times:.2f} |"
        )
    with Expander.load(model, threads=threads, gate=OPEN) as expander:
        cold, warm = _first_tokens(expander, asked[:FIRST])
    kept = f"{1000 * warm:.0f} ms, {1000 * cold:.0f} ms with nothing kept of earlier prompts"
    print(f"\nfirst token: {kept}")
    if out:
        write_json(out, {"model": model.name, "dataset": dataset, "queries": queries, "turns": turns})


def _first_tokens(expander: Expander, queries: list[str]) -> tuple[float, float]:
    """Median seconds to the first token of queries, none asked before: cold, and with the prefix kept."""
    cold, warm = [], []
    for number, query in enumerate(queries):
        expander.forget()
        cold.append(expander.expand(f"{query} {number}").prefill_s)
        warm.append(expander.expand(f"{query} {number} again").prefill_s)
    return median(cold), median(warm)


def _llama(model: Path, threads: int, expander: Expander) -> Way:
    """Its high-level call on our prompts' token ids, with its own prefix cache."""
    llama_cpp = require("llama_cpp", "llama")
    with kept_off_amx(llama_cpp, unless=may_repack(llama_cpp, model, check_gguf(model).types)):
        llama = llama_cpp.Llama(
            str(model), n_ctx=2048, n_gpu_layers=-1, n_threads=threads, n_threads_batch=threads, verbose=False
        )
    end = expander.spec.prompt.end

    def expand(queries: list[str]) -> int:
        written = 0
        for query in queries:
            prompt = expander.spec.prompt.encode(query, expander.backend.tokenize)
            found: Any = llama(prompt, max_tokens=expander.budget_tokens, temperature=0.0, stop=[end])
            written += found["usage"]["completion_tokens"]
        return written

    # In the thread of all others, or all of them would be slower (see there).
    return lambda queries: THREAD.submit(expand, queries).result()


def _one_by_one(expander: Expander) -> Way:
    return lambda queries: sum(expander.expand(query).tokens for query in queries)


def _together(expander: Expander, parallel: int) -> Way:
    return lambda queries: sum(e.tokens for e in expander.expand_many(queries, parallel=parallel))


if __name__ == "__main__":
    typer.run(main)
