"""Encoders without a student, and beside one, on a tiny collection."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from tiny_encoder import save_tiny_encoder, save_tiny_ranker

from qe_edge.bench.baselines import FIRST, fused, parse_baseline
from qe_edge.bench.bench import bench
from qe_edge.bench.config import BenchConfig
from qe_edge.bench.encoders import open_ranker
from qe_edge.bench.inputs import default_teachers
from qe_edge.bench.report.table import markdown_table
from qe_edge.bench.result import BenchResult, System, read_result
from qe_edge.errors import BadArgument, NotFound
from qe_edge.retrieval.datasets import load_dataset
from qe_edge.retrieval.trec import read_run
from qe_edge.runtime.reader import Encoder
from qe_edge.work.folder import Workdir

pytest.importorskip("llama_cpp")
TEACHER = "qe-edge/demo-teacher zero-shot"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("encoder") / "tiny.gguf")


def config(encoder: Path) -> BenchConfig:
    kinds = [f"{kind}:{encoder}" for kind in ("dense", "rerank", "hybrid")]
    return BenchConfig(
        datasets=("demo-en",), baselines=tuple(kinds), teachers=tuple(default_teachers(["demo-en"]))
    )


@pytest.fixture(scope="module")
def done(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BenchResult]:
    folder = bench(config(encoder), workdir=Workdir(tmp_path_factory.mktemp("work")))
    return folder, read_result(folder)


def rows(result: BenchResult) -> dict[str, System]:
    return {system.name: system for system in result.datasets[0].systems}


def run_of(folder: Path, name: str) -> dict[str, list[str]]:
    slug = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
    (file,) = (f for f in folder.rglob("*.trec") if f.name.rsplit("-", 1)[0] == slug)
    return {query_id: [doc_id for doc_id, _ in ranking] for query_id, ranking in read_run(file).items()}


def test_rows_stand_beside_bm25_alone_and_with_each_text(done: tuple[Path, BenchResult]) -> None:
    _, result = done
    found = rows(result)
    alone = ["rerank tiny", "dense tiny", "hybrid tiny"]
    assert [name for name in found if name in alone] == alone
    for mode in ("zero-shot", "few-shot"):
        assert {f"qe-edge/demo-teacher {mode} + {kind} tiny" for kind in ("dense", "hybrid")} <= found.keys()
    assert not any("+ rerank" in name for name in found)
    assert result.datasets[0].teacher in (TEACHER, TEACHER.replace("zero", "few"))
    for name in alone:
        speed = found[name].speed
        assert speed and 0 < speed.ms_per_query_p50 <= speed.ms_per_query_p95
        assert found[name].vs_bm25 is not None
    once = found["dense tiny"].encoding
    assert once and once == found["hybrid tiny"].encoding and found["rerank tiny"].encoding is None
    data = load_dataset("demo-en")
    size = np.dtype(np.float32).itemsize * sum(1 for _ in data.documents()) * 16
    assert size / 1e6 < once.megabytes * 2.1
    assert "MB of vectors: all rows with dense or hybrid need it first." in markdown_table(result.datasets[0])


def test_dense_ranks_all_documents_by_cosine(done: tuple[Path, BenchResult], encoder: Path) -> None:
    data, model = load_dataset("demo-en"), Encoder(encoder)
    documents = list(data.documents())
    vectors = model.vectors([text for _, text in documents])
    found = run_of(done[0], "dense tiny")
    for query_id, query in list(data.queries.items())[:5]:
        scores = vectors @ model.vectors([query])[0]
        ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
        best = [documents[i][0] for i in ranked]
        # A tiny encoder's cosines nearly tie: the places that differ hold equal ones.
        by_id = {doc_id: scores[i] for i, (doc_id, _) in enumerate(documents)}
        pairs = zip(found[query_id], best, strict=False)
        assert all(abs(by_id[a] - by_id[b]) < 1e-5 for a, b in pairs)
    model.close()


def test_rerank_moves_the_first_ones_only(done: tuple[Path, BenchResult]) -> None:
    plain, found = run_of(done[0], "BM25"), run_of(done[0], "rerank tiny")
    for query_id, ranking in plain.items():
        assert sorted(found[query_id][:FIRST]) == sorted(ranking[:FIRST])
        assert found[query_id][FIRST:] == ranking[FIRST:]
    assert found != plain


def test_hybrid_adds_reciprocal_ranks() -> None:
    one = {"q": [("a", 9.0), ("b", 8.0), ("c", 7.0)]}
    other = {"q": [("c", 0.9), ("d", 0.5)]}
    (ranking,) = fused(one, other, 3).values()
    assert ranking == [
        ("c", pytest.approx(1 / 63 + 1 / 61)),
        ("a", pytest.approx(1 / 61)),
        ("b", pytest.approx(1 / 62)),
    ]


def test_vectors_are_kept_for_the_next_bench(encoder: Path, tmp_path: Path) -> None:
    work = Workdir(tmp_path)
    first = rows(read_result(bench(config(encoder), workdir=work)))
    (kept,) = (work.root / "vectors").iterdir()
    before = (kept / "vectors.npy").stat().st_mtime_ns
    again = rows(read_result(bench(config(encoder), workdir=work)))
    assert (kept / "vectors.npy").stat().st_mtime_ns == before
    assert again["dense tiny"].encoding == first["dense tiny"].encoding
    assert again["dense tiny"].per_query == first["dense tiny"].per_query


def test_mistakes_are_found_before_the_work(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="write dense:MODEL, rerank:MODEL or hybrid:MODEL"):
        parse_baseline(f"colbert:{encoder}")
    with pytest.raises(NotFound, match=r"neither a \.gguf file \(here, or hf:…\), nor a model folder"):
        parse_baseline(f"dense:{tmp_path / 'none.gguf'}")
    twice = msgspec.structs.replace(config(encoder), baselines=(f"dense:{encoder}",) * 2)
    with pytest.raises(BadArgument, match="two baselines have the same name"):
        bench(twice, workdir=Workdir(tmp_path))
    with pytest.raises(ValueError, match="need our own index"):
        BenchConfig(datasets=("demo-en",), baselines=(f"dense:{encoder}",), retriever="http://x/i")


def test_sentence_transformers_rank_as_llama_cpp_does(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    texts = ["the moon causes tides", "bread rises", "yeast", "the sea"]
    ours = open_ranker(str(encoder), threads=1)
    theirs = open_ranker(str(save_tiny_ranker(tmp_path / "tiny", cross=False)), threads=1)
    assert (ours.engine, theirs.engine, theirs.size) == ("llama.cpp", "sentence-transformers", ours.size)
    np.testing.assert_allclose(theirs.vectors(texts), ours.vectors(texts), atol=1e-3)
    scores = [ranker.scores("what causes tides", texts) for ranker in (theirs, ours)]
    np.testing.assert_allclose(*scores, atol=1e-3)
    mixed = [ranker.query_vector("what causes tides", "the moon") for ranker in (ours, theirs)]
    np.testing.assert_allclose(*mixed, atol=1e-3)
    assert not theirs.knows("潮汐") and theirs.knows("tides")


def test_a_cross_encoder_reranks_and_does_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = save_tiny_ranker(tmp_path / "cross", cross=True)
    ranker = open_ranker(str(folder), threads=1)
    texts = ["the moon causes tides", "bread rises", "yeast"]
    model, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    pairs = tokenizer(["what causes tides"] * 3, texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = torch.sigmoid(model(**pairs).logits[:, 0]).numpy()
    np.testing.assert_allclose(ranker.scores("what causes tides", texts), expected, atol=1e-5)
    work = Workdir(tmp_path / "work")
    one = BenchConfig(datasets=("demo-en",), baselines=(f"rerank:{folder}",))
    result = read_result(bench(one, workdir=work))
    row = rows(result)["rerank cross"]
    assert row.speed and row.speed.engine == "sentence-transformers" and row.encoding is None
    with pytest.raises(BadArgument, match="a cross-encoder makes no vectors"):
        bench(msgspec.structs.replace(one, baselines=(f"dense:{folder}",)), workdir=work)


def test_a_folder_that_holds_no_model_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFound, match="empty can't be loaded by sentence-transformers"):
        open_ranker(str(tmp_path / "empty"), threads=1)


def test_an_encoder_without_the_language_is_warned_of(encoder: Path, tmp_path: Path, capsys) -> None:
    config = BenchConfig(datasets=("demo-zh",), baselines=(f"dense:{encoder}",))
    result = read_result(bench(config, workdir=Workdir(tmp_path)))
    (warning,) = [text for text in result.warnings if "no tokens" in text]
    assert warning == f"tiny has no tokens for {len(result.datasets[0].queries)} queries of demo-zh@test"
    assert f"warning: {warning}\n" in capsys.readouterr().err
