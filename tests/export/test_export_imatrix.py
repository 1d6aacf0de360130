"""The importance matrix: what it is, what it does to a quantization, and where it comes from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training import run_sft

from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.imatrix import Importance, calibration_rows, measure_importance
from qe_edge.export.quantize import KINDS, NEED_IMPORTANCE, quantize_gguf
from qe_edge.export.source import Source
from qe_edge.student.spec import read_spec
from qe_edge.train.config import SftConfig
from qe_edge.work.files import sha256
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
import torch
from gguf import GGUFReader, dequantize

from qe_edge.train.base_model import load_tokenizer


@pytest.fixture(scope="module")
def importance(tiny_qwen3: Path, data: Path) -> Importance:
    spec = read_spec(tiny_qwen3)
    assert spec
    files = [data / "expansions.jsonl"]
    rows = calibration_rows(files, SftConfig(), spec, load_tokenizer(str(tiny_qwen3)))
    return measure_importance(Source(tiny_qwen3), rows, files)


def test_importance_is_the_mean_square_of_a_matrixs_inputs(
    importance: Importance, tiny_qwen3: Path, data: Path
) -> None:
    """The first layer's inputs are the normalized embeddings, which needs no model to compute."""
    from safetensors.torch import load_file

    spec = read_spec(tiny_qwen3)
    assert spec
    rows = calibration_rows([data / "expansions.jsonl"], SftConfig(), spec, load_tokenizer(str(tiny_qwen3)))
    assert len(rows) == importance.rows == 8
    ids = torch.tensor([token for ids, _ in rows for token in ids])
    assert importance.tokens == len(ids)
    weights = {name: tensor.float() for name, tensor in load_file(tiny_qwen3 / "model.safetensors").items()}
    embedded = weights["model.embed_tokens.weight"][ids]
    inputs = embedded * torch.rsqrt(embedded.square().mean(1, keepdim=True) + 1e-6)
    inputs *= weights["model.layers.0.input_layernorm.weight"]
    expected = inputs.square().mean(0).numpy()
    for name in ("attn_q", "attn_k", "attn_v"):
        assert importance.values[f"blk.0.{name}.weight"] == pytest.approx(expected, rel=1e-4)


def test_it_names_every_matrix_but_embeddings_and_output(
    importance: Importance, tiny_qwen3: Path, tmp_path: Path
) -> None:
    reader = GGUFReader(str(convert_gguf(tiny_qwen3, tmp_path / "base.gguf")))
    matrices = {t.name: int(t.shape[0]) for t in reader.tensors if len(t.shape) == 2}
    del matrices["token_embd.weight"]
    assert {name: len(values) for name, values in importance.values.items()} == matrices


@pytest.mark.parametrize("kind", ["Q4_K_M", "IQ4_XS", "Q2_K"])
def test_it_lowers_the_error_of_the_inputs_that_matter(
    importance: Importance, tiny_qwen3: Path, tmp_path: Path, kind: str
) -> None:
    base = convert_gguf(tiny_qwen3, tmp_path / "base.gguf", dtype="f32")
    plain = quantize_gguf(base, tmp_path / "plain.gguf", kind)
    weighted = quantize_gguf(base, tmp_path / "weighted.gguf", kind, importance=importance)
    exact, *others = (
        {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(str(f)).tensors}
        for f in (base, plain, weighted)
    )
    errors = [
        sum(((other[n] - exact[n]) ** 2 * values).sum() for n, values in importance.values.items())
        for other in others
    ]
    assert errors[1] < 0.98 * errors[0]
    fields = GGUFReader(str(weighted)).fields
    assert fields["quantize.imatrix.entries_count"].contents() == len(importance.values)
    assert fields["quantize.imatrix.chunks_count"].contents() == 8
    ((name, digest),) = importance.files
    assert fields["quantize.imatrix.dataset"].contents() == f"{name} sha256:{digest[:12]}"
    assert "quantize.imatrix.dataset" not in GGUFReader(str(plain)).fields


def test_kinds_that_need_it_say_so_and_work_with_it(
    importance: Importance, tiny_qwen3: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadArgument, match=r"IQ2_XS needs an importance matrix.*--calibrate"):
        export_model(tiny_qwen3, tmp_path / "out", ExportConfig(kinds=["Q4_0", "IQ2_XS"], formats=["gguf"]))
    assert not (tmp_path / "out").exists()
    base = convert_gguf(tiny_qwen3, tmp_path / "base.gguf")
    for kind in KINDS:
        file = quantize_gguf(base, tmp_path / f"{kind}.gguf", kind, importance=importance)
        assert file.stat().st_size < 0.6 * base.stat().st_size
        if kind in NEED_IMPORTANCE:
            with pytest.raises(QeEdgeError, match="requires an importance matrix"):
                quantize_gguf(base, tmp_path / "plain.gguf", kind)
        else:
            quantize_gguf(base, tmp_path / "plain.gguf", kind)


def calibration_of(model: Path, out: Path) -> Any:
    """What an export is calibrated on that is made in another working folder."""
    command = [sys.executable, "-m", "qe_edge", "export", model, "--out", out, "--format", "gguf"]
    subprocess.run(list(map(str, command)), check=True, cwd="/", capture_output=True)
    return read_record(out)["calibration"]


def test_an_export_takes_what_the_student_was_trained_on(
    tiny_qwen3: Path, data: Path, tmp_path: Path
) -> None:
    from qe_edge.train.merge import merge

    trained = run_sft(tiny_qwen3, data, tmp_path / "work", epochs=2)
    merged = merge(trained, workdir=Workdir(tmp_path / "work"))
    out = tmp_path / "out"
    export_model(merged, out, ExportConfig(kinds=["Q4_K_M"]))
    file = data / "expansions.jsonl"
    calibration = read_record(out)["calibration"]
    assert calibration["files"] == [{"name": file.name, "sha256": sha256(file)}]
    assert calibration["rows"] == 8
    assert "importance matrix" in (out / "README.md").read_text()

    # Where the file comes from is inside it, and beside the MLX weights; no path of this machine is.
    field = GGUFReader(str(out / "student-Q4_K_M.gguf")).fields["qe_edge.provenance"].contents()
    beside = (out / "student-mlx-5bit" / "qe_edge_provenance.json").read_text()
    assert json.loads(field) == json.loads(beside)
    assert str(tmp_path) not in field and str(tiny_qwen3.parent) not in field
    (training,) = json.loads(field)["trainings"]
    assert (training["command"], training["rows"]) == ("train sft", 8)
    assert training["inputs"] == {"expansions[0]": sha256(file)}
    assert training["settings"]["rank"] == 4
    assert training["train_loss"] == read_record(trained)["metrics"]["train_loss"]

    # From anywhere, and only the rows that were trained on.
    assert calibration_of(merged, tmp_path / "elsewhere") == calibration
    few = run_sft(tiny_qwen3, data, tmp_path / "few", max_rows=3)
    assert calibration_of(merge(few, workdir=Workdir(tmp_path / "few")), tmp_path / "fewer")["rows"] == 3

    plain = tmp_path / "plain"
    export_model(merged, plain, ExportConfig(kinds=["Q4_K_M"], formats=["gguf"], no_calibrate=True))
    assert read_record(plain)["calibration"] is None
    ours, theirs = (GGUFReader(str(f / "student-Q4_K_M.gguf")).tensors for f in (out, plain))
    pairs = list(zip(ours, theirs, strict=True))
    assert any(not np.array_equal(a.data, b.data) for a, b in pairs)


def test_unusable_expansions_are_named_before_anything_is_written(tiny_qwen3: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"query": 1}\n')
    with pytest.raises(BadInput, match=r"bad.jsonl:1: "):
        export_model(
            tiny_qwen3, tmp_path / "out", ExportConfig(formats=["gguf"], calibrate=[tmp_path / "bad.jsonl"])
        )
    assert not (tmp_path / "out").exists()
