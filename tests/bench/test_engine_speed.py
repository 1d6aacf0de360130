"""Speed beside the plain loop over llama.cpp, on models of random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import first_tokens

from qe_edge.backends.llama_cpp import LlamaCppBackend
from qe_edge.bench import synthetic
from qe_edge.bench.engine_speed import ANSWER, engine_speed, plain_loop, synthetic_gguf
from qe_edge.bench.speed import peak_memory_mb
from qe_edge.errors import BadArgument, NotFound, QeEdgeError
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.quantize import quantize_gguf
from qe_edge.student.models import resolve

pytest.importorskip("llama_cpp")
torch = pytest.importorskip("torch")


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


def test_the_command_prints_a_row_for_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qe_edge.cli import main

    arguments = ["--synthetic", "small", "--quant", "Q4_0", "--quant", "Q8_0", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", ["qe-edge", "bench", "speed", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    models = json.loads(capsys.readouterr().out)["metrics"]["models"]
    assert [model["model"] for model in models] == ["small-Q4_0.gguf", "small-Q8_0.gguf"]


def test_options_before_the_subcommand_are_not_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from qe_edge.cli import main

    monkeypatch.setattr(sys, "argv", ["qe-edge", "bench", "--threads", "1", "speed", "--synthetic", "small"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "--threads comes before `speed`; put it after" in capsys.readouterr().err


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
