"""The result file of a bench run. Reports are computed from these files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec

from qe_edge.errors import BadInput, NotFound
from qe_edge.retrieval.datasets import DatasetInfo
from qe_edge.retrieval.measures import Interval

SCHEMA_VERSION = 1
RESULT = "result.json"

Kind = Literal["bm25", "feedback", "run", "model", "teacher"]


class Speed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How fast a model wrote its expansions, one query at a time, its KV cache emptied before each.

    Rates are totals over totals after one warm-up query; a cold start is `load_s` apart.
    `mean_tokens` counts what the model wrote per query. `decode_tokens_per_s` is None where it only read
    (feedback), `prefill_tokens_per_s` where an encoder read, `threads` where the engine takes no such setting
    (MLX), and `joules_per_query` where the machine doesn't tell what it uses (see `EnergyMeter`). Where
    nobody chose `threads`, there were fewer whenever other processes were at work. `reused` are figures of an
    earlier run, whose texts are taken again.
    """

    engine: str
    threads: int | None
    load_s: float
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    ms_per_query_p50: float
    ms_per_query_p95: float
    mean_tokens: float
    peak_memory_mb: float
    file_mb: float
    first_token_ms_p50: float | None = None
    joules_per_query: float | None = None
    reused: bool = False


class Encoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What it took an encoder to read all documents, once: on so many threads, to so many MB of vectors."""

    seconds: float
    threads: int
    megabytes: float


class System(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One row: plain BM25, BM25 with feedback, another system's run, a model, or a teacher's expansions.

    nDCG values lie in 0..1. Differences and ratios are paired over the queries, each with its 95 %
    bootstrap interval; they are None where there is nothing to compare with. `retention` is this
    system / teacher; `gain_retention` is (this - BM25) / (teacher - BM25).
    `measures` holds what was asked for besides, and `budgets` nDCG@10 by how many tokens of the same
    generation are used. `p_vs_bm25` and `p_vs_teacher` are two-sided p-values of paired randomization tests,
    corrected by Holm over all systems that are compared with the same one.
    `helped` and `hurt` count queries against plain BM25. `failed` counts the queries that have no expansion,
    because a generation failed or was empty, or a teacher's file lacks them: they are searched as they are.
    `encoding` is what a dense row needs before the first query.
    """

    name: str
    kind: Kind
    join: str
    ndcg: Interval
    vs_bm25: Interval | None = None
    vs_teacher: Interval | None = None
    p_vs_bm25: float | None = None
    p_vs_teacher: float | None = None
    retention: Interval | None = None
    gain_retention: Interval | None = None
    helped: int = 0
    hurt: int = 0
    failed: int = 0
    sha256: str | None = None
    speed: Speed | None = None
    encoding: Encoding | None = None
    per_query: dict[str, float]
    measures: dict[str, Interval] = {}
    budgets: dict[int, Interval] = {}
    expansions: dict[str, str] = {}


class DatasetResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All systems on one data set; `teacher` names the system that retention refers to.

    `warnings` are what its tables must say, such as which model has no row and why.
    """

    info: DatasetInfo
    fingerprint: str
    measure: str
    queries: dict[str, str]
    teacher: str | None
    systems: list[System]
    warnings: list[str] = []


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model's join was chosen: nDCG@10 of each candidate on the queries of another data set."""

    model: str
    dataset: str
    curve: dict[str, Interval]
    chosen: str


BUSY = 0.2  # share of the processors at work for others, from which they disturb what is timed


class BenchResult(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bench run on one machine.

    `settings` are the BenchConfig's, `resamples` the bootstrap's; `failures` name the models that have
    no row because they failed; `tuning` says how the models' joins were chosen, if they were.
    """

    created: str
    label: str
    machine: dict[str, Any]
    versions: dict[str, str]
    datasets: list[DatasetResult]
    settings: dict[str, Any]
    resamples: int
    warnings: list[str] = []
    failures: list[str] = []
    tuning: list[Tuning] = []
    schema_version: int = SCHEMA_VERSION


class _Version(msgspec.Struct):
    schema_version: int = 1


def read_result(path: Path | str) -> BenchResult:
    """Read a result file, or the one in a bench run's folder."""
    path = Path(path)
    if path.is_dir():
        path = path / RESULT
    try:
        content = path.read_bytes()
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise BadInput(f"a bench result of version {version}; update qe-edge", path=path)
        return msgspec.json.decode(content, type=BenchResult)
    except FileNotFoundError:
        made = sorted([*path.parent.glob(f"*/{RESULT}"), *path.parent.glob(f"bench/*/{RESULT}")])
        there = f"; the last one there is {made[-1].parent}" if made else ""
        raise NotFound(f"{path}: no such bench result; `qe-edge bench` writes one{there}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadInput(f"not a bench result: {error}", path=path) from None
