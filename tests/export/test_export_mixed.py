"""Mixed precision by measurement, and the adapter alone: real llama.cpp on a tiny student."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import save_tiny_qwen3
from training import SMALL_DPO, run_sft, write_task

from qe_edge.backends.amx import kept_off_amx
from qe_edge.errors import BadArgument, BadInput
from qe_edge.export.adapter import convert_adapter
from qe_edge.export.config import ExportConfig
from qe_edge.export.export import export_model
from qe_edge.export.gguf import convert_gguf
from qe_edge.export.imatrix import calibration_rows, measure_importance
from qe_edge.export.mixed import Effect, Student, cheapest, group, measure_effects, types_of
from qe_edge.export.source import Source
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
from gguf import GGUFReader

from qe_edge.student.spec import read_spec
from qe_edge.train.base_model import load_tokenizer
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.merge import merge


def test_matrices_too_narrow_for_a_type_get_another_that_is_measured(tmp_path: Path) -> None:
    """As SmolLM2-135M's, whose width is no multiple of 256."""
    narrow = save_tiny_qwen3(tmp_path / "narrow", hidden_size=288)
    files = [write_task(tmp_path) / "expansions.jsonl"]
    result = export_model(
        narrow,
        tmp_path / "out",
        ExportConfig(kinds=["Q8_0"], formats=["gguf"], budget_mb=1.5, calibrate=files),
    )
    reader = GGUFReader(str(tmp_path / "out" / "student-mixed.gguf"))
    found = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    assert found == result["types"]
    by_width = {width: {found[t.name] for t in reader.tensors if t.shape[0] == width and t.name in found}
                for width in (288, 512)}  # fmt: skip
    assert by_width[288] <= {"Q4_0", "IQ4_NL", "Q5_0", "Q5_1", "Q8_0"}
    assert by_width[512] <= {"Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert result["files"]["student-mixed.gguf"] <= 1.5e6


@pytest.fixture(scope="module", params=["qwen3"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny student after SFT and DPO."""
    work = tmp_path_factory.mktemp("work")
    data = write_task(work)
    student = request.getfixturevalue(f"tiny_{request.param}")
    trained = run_sft(student, data, work, epochs=8, learning_rate=5e-3)
    aligned = dpo(data / "pairs.jsonl", trained, DpoConfig(**SMALL_DPO, epochs=2), workdir=Workdir(work))
    return merge(aligned, workdir=Workdir(work))


def test_a_mixed_file_keeps_its_budget_and_its_types(merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(merged, out, ExportConfig(kinds=["Q4_K_M", "Q8_0"], formats=["gguf"], budget_mb=1.4))
    record = read_record(out)
    size = record["files"]["student-mixed.gguf"]
    assert size <= 1.4e6
    # Its own size is enough for it, to the byte.
    again = export_model(
        merged, tmp_path / "again", ExportConfig(kinds=["Q8_0"], formats=["gguf"], budget_mb=size / 1e6)
    )
    assert (again["files"]["student-mixed.gguf"], again["types"]) == (size, record["types"])
    reader = GGUFReader(str(out / "student-mixed.gguf"))
    assert reader.fields["qe_edge.quantization"].contents() == "mixed"
    found = {t.name: t.tensor_type.name for t in reader.tensors if len(t.shape) == 2}
    assert found == record["types"]
    assert len(set(found.values())) > 1
    checks = record["checks"]
    assert checks["student-mixed.gguf"]["kl_divergence"] > checks["student-Q8_0.gguf"]["kl_divergence"]
    assert "student-mixed.gguf" in (out / "README.md").read_text()


@pytest.mark.parametrize("merged", ["qwen3", "qwen2", "llama"], indirect=True)
def test_an_effect_is_what_the_quantized_group_alone_does(merged: Path, tmp_path: Path) -> None:
    """The measured divergence of a group against llama.cpp's own, with that group alone quantized."""
    import llama_cpp
    from scipy.special import log_softmax

    from qe_edge.export.quantize import quantize_gguf

    source, spec = Source(merged), read_spec(merged)
    assert spec
    files = [merged.parent.parent / "expansions.jsonl"]
    rows = calibration_rows(files, SftConfig(), spec, load_tokenizer(str(merged)))[:2]
    importance = measure_importance(source, rows, files)
    base = convert_gguf(merged, tmp_path / "base.gguf", dtype="f32")
    groups, student = group(source), Student(source, rows)
    start = quantize_gguf(base, tmp_path / "start.gguf", "Q4_K_M", importance=importance)
    student.take(start, groups)

    def divergence(path: Path) -> float:
        return float(
            np.mean([(np.exp(p) * (p - q)).sum(1).mean() for p, q in zip(exact, answers(path), strict=True)])
        )

    def answers(path: Path) -> list[np.ndarray]:
        with kept_off_amx(llama_cpp):
            llama = llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, verbose=False)
        found = []
        for ids, begin in rows:
            llama.reset()
            llama.eval(ids)
            found.append(log_softmax(llama.scores[begin - 1 : len(ids) - 1].astype(float), axis=1))
        llama.close()
        return found

    exact = answers(base)
    before = divergence(start)
    assert student.divergence() == pytest.approx(before, rel=0.1)
    effects = measure_effects(student, start, base, groups, importance, tmp_path)
    assert student.divergence() == pytest.approx(before, rel=0.1)  # all is put back
    assert {kind for effect in effects["ffn_down 0"] for kind in effect.types.values()} == {
        "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0",
    }  # fmt: skip
    assert all(found[0].divergence == 0.0 for found in effects.values())
    for name in ("ffn_down 0", "attn_q 2", "token_embd.weight"):
        effect = effects[name][1]
        assert set(effect.types.values()) == {"Q3_K"}
        types = types_of(start) | effect.types
        file = quantize_gguf(base, tmp_path / "one.gguf", "Q4_K_M", importance=importance, types=types)
        # llama.cpp rounds activations too, which changes a little of everything.
        assert effect.divergence == pytest.approx(divergence(file) - before, rel=0.1, abs=5e-4)
    assert max(effect.divergence for found in effects.values() for effect in found) > 2e-3


def test_the_cheapest_choice_is_the_best_that_fits() -> None:
    effects = {
        "a": [Effect({"a": "Q3_K"}, 10, 0.5), Effect({"a": "Q8_0"}, 30, 0.1)],
        "b": [
            Effect({"b": "Q3_K"}, 10, 0.3),
            Effect({"b": "Q4_K"}, 20, 0.2),
            Effect({"b": "Q8_0"}, 30, -0.01),
        ],
    }

    def types(budget: int) -> list[str] | None:
        chosen = cheapest(effects, budget)
        return chosen and [kind for effect in chosen.values() for kind in effect.types.values()]

    assert types(60) == ["Q8_0", "Q8_0"]
    assert types(59) == ["Q8_0", "Q4_K"]
    assert types(40) == ["Q8_0", "Q3_K"]
    assert types(39) == ["Q3_K", "Q4_K"]
    assert types(20) == ["Q3_K", "Q3_K"]
    assert types(19) is None


def test_what_is_no_better_than_llama_cpps_mixture_is_not_taken(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured effects that mislead: everything would be put into the smallest type."""
    from qe_edge.export import mixed

    def misled(*args: Any) -> dict[str, list[Effect]]:
        found = measure_effects(*args)
        return {
            name: [e._replace(divergence=float(e.bytes)) for e in effects] for name, effects in found.items()
        }

    plain = export_model(merged, tmp_path / "plain", ExportConfig(kinds=["Q4_K_M"], formats=["gguf"]))
    size = plain["files"]["student-Q4_K_M.gguf"] / 1e6
    monkeypatch.setattr(mixed, "measure_effects", misled)
    result = export_model(
        merged, tmp_path / "out", ExportConfig(kinds=["Q8_0"], formats=["gguf"], budget_mb=size + 1e-5)
    )
    assert result["types"] == types_of(tmp_path / "plain" / "student-Q4_K_M.gguf")


def test_a_budget_below_the_least_is_refused(merged: Path, tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(BadArgument, match=r"0\.05 MB is below \d\.\d+ MB, which the matrices take") as early:
        export_model(
            merged, tmp_path / "out", ExportConfig(formats=["gguf"], budget_mb=0.05), progress=said.append
        )
    assert said == []  # before anything was measured
    least = float(re.findall(r"below (\d+\.\d+) MB", str(early.value))[0])
    with pytest.raises(BadArgument, match="is below the least, ") as exact:
        export_model(merged, tmp_path / "out", ExportConfig(formats=["gguf"], budget_mb=least + 0.01))
    metadata = float(re.findall(r"least, (\d+\.\d+) MB", str(exact.value))[0]) - least
    assert 0 < metadata < 0.5
    with pytest.raises(BadArgument, match="a mixed file needs an importance matrix"):
        export_model(merged, tmp_path / "out", ExportConfig(formats=["gguf"], budget_mb=3, no_calibrate=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merged", ["qwen3", "qwen2", "llama"], indirect=True)
def test_the_adapter_alone_answers_as_the_merged_student(merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_model(merged, out, ExportConfig(kinds=["Q8_0"], formats=["gguf"], adapter=True))
    check = read_record(out)["checks"]["adapter"]
    assert check["logit_cosine"] > 0.9999
    assert check["greedy_agreement"] > 0.9
    fields = GGUFReader(str(out / "adapter" / "student-lora.gguf")).fields
    assert fields["general.type"].contents() == "adapter"
    assert fields["adapter.lora.alpha"].contents() == 8.0
    assert "--lora adapter/student-lora.gguf" in (out / "README.md").read_text()
    assert "adapter/student-lora.gguf" in (out / "SHA256SUMS").read_text()
    assert [path.name for path in out.glob("*.gguf")] == ["student-Q8_0.gguf"]


def test_what_is_no_plain_lora_is_refused(merged: Path, tiny_qwen3: Path, tmp_path: Path) -> None:
    import json
    import shutil

    with pytest.raises(BadArgument, match="wasn't merged from a LoRA adapter"):
        export_model(
            tiny_qwen3, tmp_path / "out", ExportConfig(kinds=["F16"], formats=["gguf"], adapter=True)
        )
    adapter = Path(read_record(merged)["inputs"]["adapter"]["path"])
    changed: dict[str, Any] = {"use_dora": True, "use_rslora": True, "bias": "all", "rank_pattern": {"q": 2}}
    for i, (key, value) in enumerate(changed.items()):
        copy = shutil.copytree(adapter, tmp_path / str(i))
        config = json.loads((copy / "adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(BadInput, match="isn't plain LoRA"):
            convert_adapter(copy, Source(merged), tmp_path / "lora.gguf")
    shutil.copyfile(adapter / "adapter_config.json", copy / "adapter_config.json")
    (copy / "adapter_model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        convert_adapter(copy, Source(merged), tmp_path / "lora.gguf")
