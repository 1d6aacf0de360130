"""Made-up bench results for tables and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qe_edge.bench.result import BenchResult, DatasetResult, Kind, Speed, System
from qe_edge.records import Lang
from qe_edge.retrieval.datasets import DatasetInfo
from qe_edge.retrieval.measures import Interval, mean_interval, ratio_interval

HOSTILE = "</script><b>x"
ENGLISH = [HOSTILE, *(f"what makes tide number {n} rise at noon" for n in range(2, 27))]
CHINESE = ["长江流经哪些省份", "谁发明了造纸术", "为什么天空是蓝色的", "珠穆朗玛峰有多高"] * 3


def values(mean: float, count: int, seed: int) -> dict[str, float]:
    """Per-query values with about this mean, the harder queries alike for all systems."""
    hardness = np.random.default_rng(1).normal(0, 0.22, count)
    own = np.random.default_rng(seed).normal(0, 0.12, count)
    noise = hardness + own
    raw = np.clip(mean + noise - noise.mean(), 0.02, 1.0)
    return {f"q{n}": float(v) for n, v in enumerate(np.clip(raw + mean - raw.mean(), 0, 1), 1)}


def system(
    name: str,
    kind: Kind,
    own: dict[str, float],
    bm25: dict[str, float],
    teacher: dict[str, float],
    **rest: Any,
) -> System:
    mine, plain, best = (list(v.values()) for v in (own, bm25, teacher))
    gains = [a - b for a, b in zip(mine, plain, strict=True)]
    model = kind == "model"
    return System(
        name=name,
        kind=kind,
        join="mass:0.7" if model else "repeat:5",
        ndcg=mean_interval(mine),
        vs_bm25=None if kind == "bm25" else mean_interval(gains),
        vs_teacher=mean_interval([a - b for a, b in zip(mine, best, strict=True)]) if model else None,
        retention=ratio_interval(mine, best) if model else None,
        gain_retention=ratio_interval(gains, [a - b for a, b in zip(best, plain, strict=True)])
        if model
        else None,
        helped=sum(gain > 0 for gain in gains),
        hurt=sum(gain < 0 for gain in gains),
        per_query=own,
        **rest,
    )


def speed(tokens_per_s: float, megabytes: float) -> Speed:
    return Speed(
        engine="llama.cpp",
        threads=2,
        load_s=0.41,
        prefill_tokens_per_s=9 * tokens_per_s,
        decode_tokens_per_s=tokens_per_s,
        ms_per_query_p50=1000 * 61 / tokens_per_s,
        ms_per_query_p95=1000 * 98 / tokens_per_s,
        mean_tokens=63.5,
        peak_memory_mb=megabytes + 140,
        file_mb=megabytes,
    )


def dataset(
    name: str, lang: Lang, queries: list[str], means: Mapping[str, tuple[Kind, float, Speed | None]]
) -> DatasetResult:
    ids = {f"q{n}": text for n, text in enumerate(queries, 1)}
    own = {
        system_name: values(mean, len(queries), seed)
        for seed, (system_name, (_, mean, _)) in enumerate(means.items(), 2)
    }
    teachers = [n for n, (kind, _, _) in means.items() if kind == "teacher"]
    systems = [
        system(
            n,
            kind,
            own[n],
            own["BM25"],
            own[teachers[-1]],
            speed=timing,
            expansions={i: f"{text} {HOSTILE} high water follows the moon" for i, text in ids.items()},
        )
        for n, (kind, _, timing) in means.items()
    ]
    info = DatasetInfo(name, lang, 5183, len(queries), 812)
    return DatasetResult(info, "8c1f02d4", "nDCG@10", ids, teachers[-1], systems)


def bench(label: str = "laptop, 2 cores", factor: float = 1.0) -> BenchResult:
    english = dataset(
        "demo-en@test",
        "en",
        ENGLISH,
        {
            "BM25": ("bm25", 0.434, None),
            "smollm2-135m base": ("model", 0.41, speed(61 * factor, 270)),
            "student-BF16": ("model", 0.503, speed(64 * factor, 270)),
            "student-Q8_0": ("model", 0.501, speed(112 * factor, 145)),
            "student-Q4_K_M": ("model", 0.497, speed(158 * factor, 105)),
            "gpt-4.1 zero-shot": ("teacher", 0.80, None),
            "gpt-4.1 few-shot": ("teacher", 0.82, None),
        },
    )
    chinese = dataset(
        "demo-zh@test",
        "zh",
        CHINESE,
        {"BM25": ("bm25", 0.33, None), "教师模型 few-shot": ("teacher", 0.52, None)},
    )
    machine = {"system": "Linux 6.12", "cpu": "Example CPU at 2.8 GHz", "cores": 2, "memory_gb": 15.6}
    versions = {"python": "3.11.9", "qe-edge": "0.1.0", "llama-cpp-python": "0.3.36"}
    return BenchResult(
        "2026-03-01T12:00:00Z",
        label,
        machine,
        versions,
        [english, chinese],
        settings={"budget_tokens": 64, "tune_on": "", "tune_joins": ["mass:0.3", "mass:0.7"]},
        resamples=10_000,
        warnings=["swap was in use"],
    )


def small() -> BenchResult:
    """Round figures, so that every cell of a table can be written down."""
    per_query = {"q1": 0.4, "q2": 0.5}

    def row(name: str, kind: Kind, **rest: Any) -> System:
        rest = {"join": "mass:0.7", "ndcg": Interval(0.485, 0.412, 0.561)} | rest
        return System(name=name, kind=kind, per_query=per_query, **rest)

    systems = [
        row("BM25", "bm25", join="", ndcg=Interval(0.434, 0.36, 0.5)),
        row(
            "my[bold]|Q4",
            "model",
            vs_bm25=Interval(0.051, -0.003, 0.101),
            retention=Interval(0.612, 0.5, 0.7),
            gain_retention=Interval(-0.061, -0.2, 0.1),
            helped=1,
            hurt=1,
            failed=2,
            speed=speed(158.4, 105.2),
        ),
        row("gpt-4.1 zero-shot", "teacher", join="repeat:5", ndcg=Interval(0.8, 0.7, 0.9), helped=2),
    ]
    info = DatasetInfo("demo-en@test", "en", 5183, 2, 812)
    data = DatasetResult(info, "8c1f", "nDCG@10", {"q1": "tides", "q2": "moon"}, "gpt-4.1 zero-shot", systems)
    return BenchResult(
        "2026-03-01T12:00:00Z",
        "laptop",
        {"cores": 2},
        {"python": "3.11.9"},
        [data],
        settings={},
        resamples=100,
    )
