"""The bench programs run: small sizes, real engines, and a table at the end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import survival
from tiny_encoder import save_tiny_encoder
from training import run_sft, write_task

from qe_edge.retrieval.datasets import builtin_folder
from qe_edge.work.folder import Workdir


def run(program: str, *arguments: object) -> list[list[str]]:
    """The cells of the Markdown table that a program prints, one of the bench or of the tests."""
    module = survival.__file__ if program == "survival" else f"-mqe_edge.bench.programs.{program}"
    command = [sys.executable, module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "TMPDIR": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in row.strip("|").split("|")] for row in rows if not set(row) <= set("|:- ")
    ]


def test_index_speed_builds_and_searches_each_way() -> None:
    expansions = builtin_folder("demo-en") / "expansions" / "test.jsonl"
    ways = [option for way in ("ours", "bm25s") for option in ("--way", way)]
    if find_spec("tantivy"):
        ways += ["--way", "tantivy"]
    shared = ("--pool", "demo-en", "--expansions", expansions, "--documents", 2000)
    title, *rows = run("index_speed", *shared, *ways)
    assert len(title) == 8
    assert [row[0] for row in rows] == ways[1::2]
    assert all(float(cell) >= 0 for row in rows for cell in row[1:])
    assert all(float(row[-1]) > 0 and float(row[2]) > 0.05 for row in rows)


def test_query_time_gives_each_part(gguf: Path, tmp_path: Path) -> None:
    encoder = save_tiny_encoder(tmp_path / "tiny.gguf")
    shared = ("--reader", encoder, "--queries", 3)
    title, *rows = run("query_time", gguf, *shared, "--threads", 1, "--threads", 0)
    assert title == ["threads", "plain search", "prefill", "decode", "search", "read", "all"]
    assert [row[0] for row in rows] == ["1", "free cores"]
    for row in rows:
        times = [tuple(map(int, cell.split(" / "))) for cell in row[1:]]
        assert all(0 <= p50 <= p95 for p50, p95 in times)
        assert max(p50 for p50, _ in times) == times[-1][0] > 0


@pytest.mark.slow
def test_quantization_compares_every_kind_with_its_source(tiny_qwen3: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from qe_edge.train.merge import merge

    data = write_task(tmp_path)
    model = merge(run_sft(tiny_qwen3, data, tmp_path), workdir=Workdir(tmp_path))
    arguments = ("-d", "demo-en", "--calibrate", data / "expansions.jsonl", "--budget-mb", 1.4)
    title, *rows = run("quantization", model, *arguments, "--quant", "Q8_0", "--quant", "IQ2_XS")
    assert title[:4] == ["kind", "imatrix", "MB", "KL"]
    found = {(row[0], row[1]): row for row in rows}
    assert found.keys() == {
        ("BF16", "no"), ("Q8_0", "no"), ("Q8_0", "yes"), ("IQ2_XS", "yes"), ("mixed 1.4 MB", "yes"),
    }  # fmt: skip
    divergence = {kind: float(row[3]) for (kind, _), row in found.items()}
    assert divergence["BF16"] < divergence["Q8_0"] < divergence["mixed 1.4 MB"] < divergence["IQ2_XS"]
    assert found["BF16", "no"][-2:] == ["–", "1.00"]
    assert all(re.fullmatch(r"\d?\.\d{3}", row[6]) for row in rows)


@pytest.mark.slow
def test_export_speed_converts_each_way(tmp_path: Path) -> None:
    title, *rows = run("export_speed", "--folder", tmp_path, "--shape", "smollm2-135m", "--rounds", 1)
    assert title[4:] == ["peak memory MB", "without mapped files"]
    assert [row[0] for row in rows] == ["write", "gguf ours", "mlx ours", "mlx mlx-lm", "Q4_K_M", "export"]
    size = {row[0]: float(row[1].replace(",", "")) for row in rows}
    assert size["write"] == pytest.approx(size["gguf ours"], rel=0.02)
    assert size["gguf ours"] > 2 * size["Q4_K_M"]
    assert size["mlx ours"] == pytest.approx(size["mlx mlx-lm"], rel=0.01)


@pytest.mark.slow
def test_survival_counts_each_fault(gguf: Path) -> None:
    title, *rows = run("survival", gguf, "--rounds", 1, "--kills", 3)
    assert title[:3] == ["what", "tried", "failed"]
    assert [row[1] for row in rows] == ["3", "3", "1", "1", "1", "1"]
    assert {row[2] for row in rows} == {"0"}


def test_file_speed_compares_files(gguf: Path) -> None:
    title, *rows = run("file_speed", gguf, "--turns", 1, "--threads", 1, "--plain")
    assert len(rows) == 2 and {len(row) for row in rows} == {len(title)}


def test_runtime_speed_measures_each_way(gguf: Path, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    small = ("--queries", 4, "--parallel", 2, "--rounds", 1, "--threads", 1)
    title, *rows = run("runtime_speed", gguf, *small, "--out", out)
    assert rows and {len(row) for row in rows} == {len(title)}
    assert out.is_file()


def test_serve_load_counts_answers(gguf: Path) -> None:
    pytest.importorskip("fastapi")
    small = ("--clients", 2, "--seconds", 1, "--parallel", 1, "--budget-tokens", 4)
    title, *rows = run("serve_load", gguf, *small)
    assert len(rows) == 1 and len(rows[0]) == len(title)


@pytest.mark.slow
def test_thread_speed_measures_each_setting(gguf: Path) -> None:
    title, *rows = run("thread_speed", "--model", gguf, "--seconds", 0.2, "--rounds", 1)
    assert rows and {len(row) for row in rows} == {len(title)}


def test_gate_thresholds_prints_a_row_for_each_setting(gguf: Path, tmp_path: Path) -> None:
    title, *rows = run("gate_thresholds", gguf, "-d", "demo-en@train", "--workdir", tmp_path)
    assert rows and {len(row) for row in rows} == {len(title)}


@pytest.mark.slow
def test_train_speed_compares_with_trl(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    small = ("--layers", 1, "--steps", 3, "--rounds", 1, "--sft-batch", 1, "--dpo-batch", 1)
    title, *rows = run("train_speed", "--shape", "smollm2-135m", *small)
    assert rows and {len(row) for row in rows} == {len(title)}
