"""Speed beside the plain loop over llama.cpp, on models of random weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tiny import first_tokens

from qe_edge.backends.llama_cpp import LlamaCppBackend
from qe_edge.bench import synthetic
from qe_edge.bench.engine_speed import (
    ANSWER,
    EngineSpeed,
    Task,
    engine_speed,
    measure,
    plain_loop,
    synthetic_gguf,
    text,
)
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.console import warned
from qe_edge.errors import BadArgument, NotFound, QeEdgeError
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.quantize import quantize_gguf
from qe_edge.student.models import resolve

pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")

SMALL = EngineSpeed("a-Q4_0.gguf", 2, 91.6, 0.4, 180, 333.3, 163.1, 162, 1.005, 498.2, 24.2, 0.34, 189)
LARGE = EngineSpeed("b.gguf", 2, 8045, 1234.5, 12345, 12345, 10000, 9000, 1.11, 98765.4, 1234.5, 1.25, 123456)


@pytest.fixture(scope="module", autouse=True)
def small_shapes() -> object:
    """Nine layers show every rule of a mixture by layers; the widths of one don't fit K-quants."""
    patch = pytest.MonkeyPatch()
    patch.setitem(synthetic.SHAPES, "small", synthetic.Shape("llama", 512, 1024, 9, 8, 4, 64, 3000, True))
    patch.setitem(synthetic.SHAPES, "narrow", synthetic.Shape("llama", 576, 1536, 9, 9, 3, 64, 3000, False))
    yield
    patch.undo()


@pytest.mark.parametrize("shape", ["small", "narrow"])
@pytest.mark.parametrize("kind", ["Q4_K_M", "Q3_K_M", "Q8_0"])
def test_a_synthetic_gguf_is_laid_out_as_the_whole_model_would_be(
    tmp_path: Path, shape: str, kind: str
) -> None:
    from gguf import GGUFReader

    synthetic.model(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    synthetic.tokenizer(shape).save_pretrained(tmp_path / "model")
    whole = quantize_gguf(convert_gguf(tmp_path / "model", tmp_path / "b.gguf"), tmp_path / "w.gguf", kind)
    ours = synthetic_gguf(shape, kind, tmp_path / "synthetic")
    a, b = GGUFReader(str(ours)), GGUFReader(str(whole))
    layout = [{t.name: (t.tensor_type.name, list(t.shape)) for t in reader.tensors} for reader in (a, b)]
    assert layout[0] == layout[1]
    assert a.fields["llama.block_count"].contents() == 9
    assert [path.name for path in (tmp_path / "synthetic").iterdir()] == [f"{shape}-{kind}.gguf"]


def test_both_loops_write_the_same_tokens_and_are_measured(tmp_path: Path) -> None:
    file = synthetic_gguf("small", "Q4_0", tmp_path)
    assert synthetic_gguf("small", "Q4_0", tmp_path) == file  # kept
    backend = LlamaCppBackend(resolve(file), threads=2)
    prompt = list(range(1000, 1060))
    ours = first_tokens(backend, prompt, ANSWER)
    _, plain = plain_loop(backend.batch(1), prompt)
    assert plain == ours
    assert first_tokens(backend, prompt, ANSWER) == ours  # the loop leaves nothing behind
    backend.close()

    found = engine_speed(resolve(file), threads=2, rounds=1)
    assert (found.model, found.threads) == ("small-Q4_0.gguf", 2)
    assert found.prefill_tokens_per_s == pytest.approx(60_000 / found.first_token_ms)
    assert found.of_loop == pytest.approx(found.decode_tokens_per_s / found.loop_tokens_per_s)
    assert found.batch_tokens_per_s > 0
    assert found.bandwidth_gb_s > 0.5
    read = file.stat().st_size / 1e9  # all but the metadata
    share = found.decode_tokens_per_s * read / found.bandwidth_gb_s
    assert found.bandwidth_share == pytest.approx(share, rel=0.05)
    # Of a process of its own: this one has held torch and the whole model.
    assert found.file_mb < found.peak_memory_mb < peak_memory_mb()


def test_every_measured_turn_is_a_step_of_the_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, int | None]] = []
    steps: list[int] = []

    @contextmanager
    def progress(description: str, total: int | None) -> Iterator[Callable[[], None]]:
        told.append((description, total))
        yield lambda: steps.append(1)

    monkeypatch.setattr("qe_edge.bench.engine_speed.progress", progress)
    monkeypatch.setattr("qe_edge.bench.engine_speed.memory_bandwidth", lambda threads: 1e9)
    file = synthetic_gguf("small", "Q4_0", tmp_path)
    measure(Task(str(file), 2, 2))
    assert told == [("bench: small-Q4_0.gguf: loading", None), ("bench: small-Q4_0.gguf", 5)]
    assert len(steps) == 5  # one warms up, two are measured, and as many with all answers together


def test_the_text_says_what_each_figure_is() -> None:
    shown = text([SMALL, LARGE], 3)
    assert (
        shown
        == """\
On 2 threads; rates are medians of 3 turns (prompt 60 tokens, answer 128).

a-Q4_0.gguf
  file                  92 MB     on the disk
  memory               189 MB     most that the process took for one answer
  loading             0.40 s      until the model can be asked
  first token          180 ms     reading the prompt, writing one token
  prefill              333 tok/s  the prompt's, until the first token
  decode             163.1 tok/s  the answer's, after the first token
  of the plain loop    100 %      of what a bare llama.cpp loop decodes
  16 at once         498.2 tok/s  of so many answers, in all
  of the bandwidth      34 %      of memory's 24 GB/s, to read weights

b.gguf
  file                  8,045 MB     on the disk
  memory              123,456 MB     most that the process took for one answer
  loading            1,234.50 s      until the model can be asked
  first token          12,345 ms     reading the prompt, writing one token
  prefill              12,345 tok/s  the prompt's, until the first token
  decode             10,000.0 tok/s  the answer's, after the first token
  of the plain loop       111 %      of what a bare llama.cpp loop decodes
  16 at once         98,765.4 tok/s  of so many answers, in all
  of the bandwidth        125 %      of memory's 1,234 GB/s, to read weights"""
    )
    assert max(map(len, text([LARGE], 1000).splitlines())) <= 80
    assert text([SMALL], 1).startswith("On 2 threads; rates are medians of 1 turn (")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `qe-edge bench`."""
    from qe_edge.cli import main

    warned.clear()  # of an earlier test
    monkeypatch.setattr(sys, "argv", ["qe-edge", "bench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_has_figures_of_each_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qe_edge.bench.bench.busy", lambda: 0.2)
    arguments = ["--synthetic", "small", "--quant", "Q4_0", "--quant", "Q8_0", "--rounds", "1"]
    assert run(["speed", *arguments, "--threads", "2", "--json"], monkeypatch) == 0
    told = json.loads(capsys.readouterr().out)
    models = told["metrics"]["models"]
    assert [model["model"] for model in models] == ["small-Q4_0.gguf", "small-Q8_0.gguf"]
    assert told["inputs"] == {"model": [], "synthetic": ["small"], "quant": ["Q4_0", "Q8_0"], "threads": 2}
    assert told["warnings"] == []


def test_without_a_model_it_is_the_newest_exports_and_load_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[str] = []

    def engine_speed(ref: Any, *, threads: int | None, rounds: int) -> EngineSpeed:
        measured.append(f"{ref.path.name} {threads} {rounds}")
        return SMALL

    monkeypatch.setattr("qe_edge.bench.engine_speed.engine_speed", engine_speed)
    monkeypatch.setattr("qe_edge.bench.bench.busy", lambda: 0.51)
    export = tmp_path / "work" / "export" / "001"
    export.mkdir(parents=True)
    smaller = synthetic_gguf("small", "Q4_0", tmp_path).rename(export / "s-Q4_0.gguf")
    synthetic_gguf("small", "Q8_0", tmp_path).rename(export / "s-Q8_0.gguf")
    capsys.readouterr()
    warning = "other work took 51 % of the processors at the start: times say little"

    assert run(["speed", "--json"], monkeypatch) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert measured == ["s-Q4_0.gguf None 3"]
    assert told["inputs"] == {"model": [str(smaller)], "synthetic": [], "quant": [], "threads": 2}
    assert told["warnings"] == [warning]
    assert err.splitlines() == [
        f"model: {smaller} (the newest; name another to use that)",
        f"warning: {warning}",
        "bench: s-Q4_0.gguf",
    ]

    assert run(["speed"], monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{text([SMALL], 3)}\nnext:   ")
    assert f"bench --dataset demo-en --model {smaller}" in out


def test_options_that_would_be_dropped_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--threads", "1", "speed", "--synthetic", "small"], monkeypatch) == 2
    assert "--threads comes before `speed`; put it after" in capsys.readouterr().err
    assert run(["speed", "--quant", "Q8_0"], monkeypatch) == 2
    assert "--quant is for random weights; name their shape with --synthetic" in capsys.readouterr().err
    assert run(["speed"], monkeypatch) != 0
    assert "--model builtin:smollm2-135m" in capsys.readouterr().err


def test_what_cannot_be_measured_is_refused(tiny_qwen3: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no synthetic shape 'tiny'"):
        synthetic_gguf("tiny", "Q4_0", tmp_path)
    with pytest.raises(BadArgument, match="no kind 'IQ2_XS' for random weights"):
        synthetic_gguf("small", "IQ2_XS", tmp_path)
    with pytest.raises(QeEdgeError, match="damaged or truncated"):
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "x.gguf").write_bytes(b"GGUF")
        engine_speed(resolve(tmp_path / "broken" / "x.gguf"))
    (tmp_path / "broken" / "x.gguf").unlink()
    (tmp_path / "broken").rmdir()
    with pytest.raises(BadArgument, match="is no GGUF file"):
        engine_speed(resolve(tiny_qwen3))
    assert not list(tmp_path.iterdir())
