"""A pruned vocabulary: the same texts, the same answers, fewer rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_llama, save_tiny_qwen2, save_tiny_qwen3, tiny_tokenizer
from typer.testing import CliRunner

from qe_edge.cli import app
from qe_edge.errors import BadArgument, BadInput, NotFound
from qe_edge.export.config import ExportConfig, PruneConfig
from qe_edge.export.export import export_model
from qe_edge.export.lineage import provenance
from qe_edge.export.prune import closed, prune, prune_vocabulary, pruned_tokenizer, verify_pruned
from qe_edge.export.verify import source_of, verify_gguf
from qe_edge.records import Expansion, encode_jsonl
from qe_edge.student.spec import read_spec
from qe_edge.train.base_model import load_tokenizer
from qe_edge.train.config import SftConfig
from qe_edge.train.sft import sft
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

TEXTS = ["What causes the tides? The moon's gravity.", "潮汐是月球引力造成的。"]
ROWS = [
    Expansion("d", str(i), "what causes tides", "en", "teacher", "zero-shot", text)
    for i, text in enumerate(TEXTS[:1] * 4)
]


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any, list[int]]]:
    """Family -> its tokenizer, the one pruned to TEXTS, and the old id of each new one."""
    found = {}
    for family in ("qwen3", "llama"):
        folder = tmp_path_factory.mktemp(family)
        whole = tiny_tokenizer(family)  # type: ignore[arg-type]
        whole.save_pretrained(folder)
        file = folder / "tokenizer.json"
        described = json.loads(file.read_text(encoding="utf-8"))
        wanted = [token for text in TEXTS for token in whole.encode(text)]
        kept = closed(described, wanted, [], 0, path=file)
        file.write_text(json.dumps(pruned_tokenizer(described, kept)), encoding="utf-8")
        found[family] = whole, load_tokenizer(str(folder)), kept
    return found


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@given(text=st.text() | st.text(alphabet="the tides mon'潮汐月球的 <|im_start|>0 é", max_size=40))
def test_any_text_comes_back_as_from_the_whole_vocabulary(family, text, vocabularies):
    whole, pruned, _ = vocabularies[family]
    ids = pruned.encode(text)
    assert pruned.decode(ids) == whole.decode(whole.encode(text))
    assert len(ids) >= len(whole.encode(text))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@given(data=st.data())
def test_a_text_whose_tokens_all_stay_is_cut_as_before(family, data, vocabularies):
    whole, pruned, kept = vocabularies[family]
    words = sorted({word for text in TEXTS for word in text.split()} | {"潮汐", "月球", "的"})
    text = " ".join(data.draw(st.lists(st.sampled_from(words))))
    ids = whole.encode(text)
    if set(ids) <= set(kept):
        assert [kept[number] for number in pruned.encode(text)] == ids
    assert len(kept) < len(whole) / 2


@pytest.mark.parametrize(
    "save",
    [
        save_tiny_qwen3,
        save_tiny_qwen2,
        lambda folder: save_tiny_qwen2(folder, tied=False),
        save_tiny_llama,
    ],
    ids=["qwen3", "qwen2", "qwen2-untied", "llama"],
)
def test_a_pruned_model_is_exported_and_checked_like_any_other(save, tmp_path):
    pytest.importorskip("mlx_lm")
    model = save(tmp_path / "model")
    # Beyond what QUERIES and the prompts need.
    found = prune_vocabulary(model, tmp_path / "pruned", ["a laptop or a phone", *TEXTS], inputs={})
    assert found["tokens"] < found["of_tokens"]
    assert found["covered"] == 1
    assert found["parameters"] < found["of_parameters"]
    record = read_record(tmp_path / "pruned")
    assert record["command"] == "prune"
    assert record["checks"]["max_logit_difference"] < 1e-4
    report = export_model(tmp_path / "pruned", tmp_path / "out", ExportConfig(kinds=("F16",)))
    assert {check["token_ids"] for check in report["checks"].values()} == {"identical"}
    assert len(report["checks"]) == 2


def test_with_a_size_the_most_frequent_tokens_stay(tiny_qwen3, tmp_path):
    texts = ["laptop laptop"] * 50 + ["sugar, protein, passage, gravity, ferritin"] * 2
    whole = prune_vocabulary(tiny_qwen3, tmp_path / "whole", texts, inputs={})
    least = prune_vocabulary(tiny_qwen3, tmp_path / "least", texts, size=1, inputs={})
    some = prune_vocabulary(tiny_qwen3, tmp_path / "some", texts, size=least["tokens"] + 2, inputs={})
    assert least["tokens"] < some["tokens"] < whole["tokens"]
    assert least["covered"] < some["covered"] < whole["covered"] == 1


def test_it_is_trained_merged_and_exported_as_a_base(tiny_qwen3, tmp_path):
    rows, work = tmp_path / "rows.jsonl", Workdir(tmp_path / "work")
    rows.write_bytes(encode_jsonl(ROWS))
    small = prune(tiny_qwen3, PruneConfig(vocab_of=(str(rows),)), workdir=work)
    assert small == work.root / "prune" / "001"
    assert source_of(small) == tiny_qwen3
    assert verify_pruned(small, tiny_qwen3)["max_logit_difference"] < 1e-4
    with pytest.raises(BadInput, match=r"holds no config\.json, so it is no model folder"):
        verify_pruned(small, tmp_path)
    with pytest.raises(NotFound, match="gone: no such model folder"):
        verify_pruned(small, tmp_path / "gone")
    trained = sft([rows], SftConfig(student=str(small), max_steps=1), workdir=work)
    from qe_edge.train.merge import merge

    model = merge(trained, workdir=work)
    tokens = [read_record(small)[key] for key in ("tokens", "of_tokens")]
    assert provenance(model, read_spec(model))["vocabulary"] == tokens
    # Trained on these expansions, it knows of them: nothing need be named.
    again = prune(model, PruneConfig(), workdir=work)
    assert read_record(again)["tokens"] <= read_record(small)["tokens"]
    export_model(again, tmp_path / "out", ExportConfig(kinds=("F16",), formats=("gguf",)))
    assert verify_gguf(tmp_path / "out" / "student-F16.gguf", again)["token_ids"] == "identical"


def test_one_command_prunes_and_exports(tiny_qwen3, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(encode_jsonl(ROWS))
    command = ["export", str(tiny_qwen3), "--f16", "--format", "gguf", "--prune-vocab"]
    done = CliRunner().invoke(app, [*command, "--vocab-of", str(rows), "--vocab-of", "demo-zh", "--json"])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    small = report["inputs"]["model"]
    checked = CliRunner().invoke(app, ["verify", small, "--dataset", "demo-zh@test", "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.stdout)["metrics"].keys() == {"probes", "max_logit_difference", "retrieval"}
    assert Path(report["inputs"]["model"]).parent.name == "prune"
    whole = export_model(tiny_qwen3, tmp_path / "whole", ExportConfig(kinds=("F16",), formats=("gguf",)))
    assert report["metrics"]["files"]["student-F16.gguf"] < whole["files"]["student-F16.gguf"]


def test_what_cant_be_pruned_is_refused(tiny_qwen3, tmp_path, altered):
    work = Workdir(tmp_path / "work")
    with pytest.raises(BadArgument, match="name expansions or data sets with --vocab-of"):
        prune(tiny_qwen3, PruneConfig(), workdir=work)
    with pytest.raises(NotFound, match="no-such-data"):
        prune(tiny_qwen3, PruneConfig(vocab_of=("no-such-data",)), workdir=work)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(BadInput, match="no text"):
        prune(tiny_qwen3, PruneConfig(vocab_of=(str(tmp_path / "empty.jsonl"),)), workdir=work)
    described = {"model": {"type": "Unigram", "vocab": []}, "added_tokens": []}
    with pytest.raises(BadInput, match="byte-level BPE"):
        closed(described, [], [], 0, path=Path("tokenizer.json"))
    assert not (work.root / "prune" / "001").exists()
    for settings in ({"vocab_size": 10}, {"prune_vocab": True, "adapter": True}):
        with pytest.raises(ValueError, match="--prune-vocab"):
            ExportConfig(**settings)
