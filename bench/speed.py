"""Write a model's expansions of a query set, timing each; in a process of its own.

A process per model gives every model its own peak memory, and keeps the others' results when one
crashes. `python -m qe_edge.bench.speed` reads a task on stdin and prints one JSON object; each
expansion is appended to a file as soon as it is written, so that a killed run goes on where it was.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from qe_edge.bench.child import in_child
from qe_edge.bench.energy import EnergyMeter
from qe_edge.bench.result import Speed
from qe_edge.console import progress
from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.records import Lang, encode_jsonl, read_jsonl
from qe_edge.runtime.expander import Expander
from qe_edge.runtime.expansion import ExpandedQuery, FinishReason
from qe_edge.serve.collection import Collection
from qe_edge.student.gate import OPEN
from qe_edge.student.join import DEFAULT_JOIN, Join
from qe_edge.student.models import Engine, resolve
from qe_edge.student.spec import ModelSpec
from qe_edge.work.machine import usable_cores

WARM_UP = "warm up"
# Where the text of one generation is cut, to see what more tokens buy.
BUDGETS = (16, 32, 48, 64, 96, 128)


class Generated(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One query's expansion and its cost in tokens and seconds.

    `cut` is the text at each of BUDGETS that it is longer than. Where passages were read there are the
    weighted `terms` of the expanded query in the index, and how many passages were `read`; `seconds` then
    are those of writing, reading and the searches in between. `key` is the task's.
    """

    query_id: str
    text: str
    finish_reason: FinishReason | Literal["failed"]
    prompt_tokens: int = 0
    tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    joules: float | None = None
    cut: dict[int, str] = {}
    terms: dict[str, float] = {}
    read: int = 0
    seconds: float = 0.0
    key: str = ""

    def at(self, budget: int) -> str:
        """The text that so many tokens give."""
        return self.cut.get(budget, self.text)


class ReadTask(msgspec.Struct, frozen=True):
    """What is read: the best passages of a data set's own index, which lies in `indexes`.

    They are those of the query as the model has `written` it, which is not written again; without that,
    those of the plain one. The `reader` is an encoder's GGUF, or the model itself. At most `passages` are
    read at a time, or the model's own number.
    """

    dataset: str
    indexes: str
    analyzer: str
    written: dict[str, Generated] | None
    reader: str | None
    passages: int | None


class Task(msgspec.Struct, frozen=True):
    """What the child process is asked to do; `out` is a Generated file that it appends to.

    `key` stands for the model and all settings: rows of another key are not taken for this task's. With
    `read` passages are read, too.
    """

    model: str
    lang: Lang
    queries: dict[str, str]
    out: str
    label: str
    engine: Engine | None = None
    threads: int | None = None
    budget_tokens: int | None = None
    read: ReadTask | None = None
    key: str = ""


class Loaded(msgspec.Struct, frozen=True):
    """How the child's model loaded, and how much memory the work took."""

    spec: ModelSpec
    load_s: float = 0.0
    peak_memory_mb: float = 0.0


class WrongLanguage(QeEdgeError):
    """The model does not speak the queries' language."""


def generate(task: Task) -> tuple[list[Generated], Speed, ModelSpec]:
    """Run a task in a child process; returns every expansion, the speeds and the model's spec.

    Raises:
        WrongLanguage: nothing was generated.
        QeEdgeError: the model can't be loaded, or its process died.
    """
    loaded = in_child(work, task, what=f"running {task.model}")
    languages = loaded.spec.prompt.languages
    if task.lang not in languages:
        raise WrongLanguage(f"it speaks {', '.join(languages)} only")
    rows = list(rows_of(task).values())
    return rows, _speed(rows, loaded, task), loaded.spec


def rows_of(task: Task) -> dict[str, Generated]:
    """What is already there of a task, by query."""
    if not Path(task.out).exists():
        return {}
    return {row.query_id: row for row in read_jsonl(task.out, Generated) if row.key == task.key}


def _speed(rows: list[Generated], loaded: Loaded, task: Task) -> Speed:
    ref = resolve(task.model)
    done = [row for row in rows if row.finish_reason not in ("failed", "skipped")]
    if not done:
        raise BadInput(f"{task.model} failed on every query, or found nothing to read for any")
    times = sorted((row.seconds or row.prefill_s + row.decode_s) * 1000 for row in done)
    written = task.read is None or task.read.written is not None
    encoder = task.read.reader if task.read else None
    # The first token comes out of the prefill, so decoding makes one token less than was written,
    # or exactly as many where the end token was decoded too.
    decoded = sum(row.tokens - (row.finish_reason == "length") for row in done)
    joules = [row.joules for row in done if row.joules is not None]
    return Speed(
        engine=task.engine or ref.engine,
        threads=None if ref.engine == "mlx" else task.threads or usable_cores(),
        load_s=loaded.load_s,
        prefill_tokens_per_s=None
        if encoder
        else sum(row.prompt_tokens for row in done) / max(sum(row.prefill_s for row in done), 1e-9),
        decode_tokens_per_s=decoded / max(sum(row.decode_s for row in done), 1e-9) if written else None,
        first_token_ms_p50=None if task.read else statistics.median(r.prefill_s for r in done) * 1000,
        ms_per_query_p50=statistics.median(times),
        ms_per_query_p95=times[min(len(times) - 1, round(0.95 * (len(times) - 1)))],
        mean_tokens=statistics.fmean(row.tokens for row in done),
        peak_memory_mb=loaded.peak_memory_mb,
        file_mb=(ref.size_bytes() + (Path(encoder).stat().st_size if encoder else 0)) / 1e6,
        joules_per_query=statistics.fmean(joules) if len(joules) == len(done) else None,
    )


def work(task: Task) -> Loaded:
    """In the child: load, warm up, expand what is missing."""
    parent = os.getppid()
    _cut_incomplete_line(Path(task.out))
    done = rows_of(task)
    collection = None
    with progress(f"bench: {task.label}: loading", None):
        start = time.perf_counter()
        expander = Expander.load(
            task.model,
            engine=task.engine,
            threads=task.threads,
            budget_tokens=task.budget_tokens,
            passages=task.read.passages if task.read else None,
            reader=task.read.reader if task.read else None,
            gate=OPEN,
        )
        load_s = time.perf_counter() - start
        if task.lang not in expander.spec.prompt.languages:
            return Loaded(spec=expander.spec)
        if task.read:
            indexes = Path(task.read.indexes)
            collection = Collection.open(task.read.dataset, indexes, analyzer=task.read.analyzer)
            expander.feedback(WARM_UP, [WARM_UP])
        else:
            expander.expand(WARM_UP)
    Path(task.out).parent.mkdir(parents=True, exist_ok=True)
    todo = {query_id: text for query_id, text in task.queries.items() if query_id not in done}
    meter = EnergyMeter()
    with (
        Path(task.out).open("ab") as file,
        progress(f"bench: {task.label}", len(task.queries), done=len(done)) as advance,
    ):
        for query_id, query in todo.items():
            if os.getppid() != parent:  # it was killed, and another run may write to this file by now
                sys.exit(1)
            expander.forget()
            meter.joules()  # it counts from here on
            if task.read and collection:
                row = _read(expander, query_id, query, collection, task.read.written)
            else:
                row = _expand(expander, query_id, query)
            joules = _sum(row.joules, meter.joules())
            file.write(encode_jsonl([msgspec.structs.replace(row, joules=joules, key=task.key)]))
            file.flush()
            advance()
    expander.close()
    return Loaded(expander.spec, load_s, peak_memory_mb())


def _sum(before: float | None, now: float | None) -> float | None:
    """Joules of writing and of reading, where a meter tells them."""
    return now if before is None or now is None else before + now


def _cut_incomplete_line(path: Path) -> None:
    """A process killed while it wrote leaves half a row; that query is expanded again."""
    if path.exists():
        content = path.read_bytes()
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _expand(expander: Expander, query_id: str, query: str) -> Generated:
    try:
        expanded = expander.expand(query)
    except BadInput:  # such as a query longer than the context: counted, and searched as it is
        return Generated(query_id, "", "failed")
    return Generated(
        query_id,
        expanded.text,
        expanded.finish_reason,
        expanded.prompt_tokens,
        expanded.tokens,
        expanded.prefill_s,
        expanded.decode_s,
        cut={
            budget: " ".join(expander.backend.detokenize(list(expanded.token_ids[:budget])).split())
            for budget in BUDGETS
            if budget < expanded.tokens
        },
    )


def _read(
    expander: Expander,
    query_id: str,
    query: str,
    collection: Collection,
    written: dict[str, Generated] | None,
) -> Generated:
    found = partial(collection.found, most=expander.passages)
    row = written[query_id] if written else Generated(query_id, "", "stop")
    if row.finish_reason == "failed":
        return row
    start = time.perf_counter()
    try:
        if written:
            expanded = expander.refine(query, found, written=_expanded(row, query, expander.spec.join))
        else:
            expanded = expander.feedback(query, found(ExpandedQuery(query, "", DEFAULT_JOIN)))
    except BadInput:
        return Generated(query_id, "", "failed")
    return Generated(
        query_id,
        expanded.summary(),
        expanded.finish_reason,
        expanded.prompt_tokens,
        row.tokens,
        expanded.prefill_s,
        expanded.decode_s,
        row.joules,
        terms=collection.terms(expanded),
        read=len(expanded.relevance.weights) if expanded.relevance else 0,
        seconds=time.perf_counter() - start + row.prefill_s + row.decode_s,
    )


def _expanded(row: Generated, query: str, join: Join) -> ExpandedQuery:
    """A generated row as it came from the expander; its tokens are counted, but not kept."""
    assert row.finish_reason != "failed"
    return ExpandedQuery(
        query, row.text, join, row.prompt_tokens, (), row.finish_reason, row.prefill_s, row.decode_s
    )


def peak_memory_mb() -> float:
    """The most memory this process has held, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss survives exec and would be the parent's
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
