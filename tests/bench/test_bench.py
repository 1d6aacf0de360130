"""The whole bench on a tiny collection and a tiny model in its own process."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import ir_measures
import msgspec
import pytest
from tiny_encoder import save_tiny_encoder

from qe_edge import Expander
from qe_edge.bench.bench import bench
from qe_edge.bench.config import BenchConfig
from qe_edge.bench.generations import generate_once
from qe_edge.bench.inputs import default_models, default_teachers, learnt_by_model, parse_model, parse_run
from qe_edge.bench.quality import retrieve, values_of
from qe_edge.bench.report.columns import notes
from qe_edge.bench.report.report import report
from qe_edge.bench.report.table import console_table, latex_table, markdown_table
from qe_edge.bench.result import read_result
from qe_edge.bench.speed import Generated, Task, generate
from qe_edge.errors import BadArgument, BadInput, NotFound, QeEdgeError
from qe_edge.export.compare import check_language
from qe_edge.export.gguf import convert_gguf
from qe_edge.records import Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import Dataset, load_dataset
from qe_edge.retrieval.index import Index
from qe_edge.retrieval.measures import holm, mean, randomization_test
from qe_edge.retrieval.prf import found_texts, rm3
from qe_edge.serve.collection import Collection
from qe_edge.student.gate import OPEN, Gate
from qe_edge.student.join import Join
from qe_edge.student.spec import read_spec, write_spec
from qe_edge.work.files import sha256, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import run_record

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """The tests' machine does what it does; what is measured here is not its speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qe_edge.bench.bench.busy", lambda: 0.0)
        yield


@pytest.fixture(scope="module")
def student(tiny_qwen3, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "student-F16.gguf"
    # With an open gate: what it writes is random.
    spec = msgspec.structs.replace(read_spec(tiny_qwen3), gate=OPEN)
    return convert_gguf(tiny_qwen3, out, dtype="f16", spec=spec)


@pytest.fixture(scope="module")
def done(student, tmp_path_factory):
    """One run: BM25, the tiny student with two joins, the teacher; on demo-en."""
    work = Workdir(tmp_path_factory.mktemp("work"))
    config = BenchConfig(
        datasets=("demo-en",),
        models=(f"tiny={student}",),
        joins=("mass:0.5", "repeat:5"),
        measures=("R@100", "AP"),
        teachers=tuple(default_teachers(["demo-en"])),
        budget_tokens=20,
        hardware_label="a test machine",
    )
    return bench(config, workdir=work), work, config


def test_rows_are_bm25_the_model_per_join_and_the_teacher(done, student):
    folder, _, _ = done
    (data,) = read_result(folder).datasets
    assert [(s.name, s.kind, s.join) for s in data.systems] == [
        ("BM25", "bm25", ""),
        ("BM25 + RM3", "feedback", ""),
        ("tiny", "model", "mass:0.5"),
        ("tiny", "model", "repeat:5"),
        ("qe-edge/demo-teacher zero-shot", "teacher", "repeat:5"),
        ("qe-edge/demo-teacher few-shot", "teacher", "repeat:5"),
    ]
    bm25, feedback, model, _, second, teacher = data.systems
    assert feedback.speed is None
    assert feedback.vs_bm25.mean == pytest.approx(feedback.ndcg.mean - bm25.ndcg.mean)
    assert model.sha256 == sha256(student)
    assert model.speed.file_mb == pytest.approx(student.stat().st_size / 1e6)
    assert model.speed.mean_tokens <= 20
    assert model.speed.decode_tokens_per_s > 0
    assert model.speed.peak_memory_mb > model.speed.file_mb
    assert data.teacher == teacher.name
    assert bm25.vs_bm25 is None
    assert teacher.retention is None
    assert model.helped + model.hurt <= len(data.queries)
    means = [s.ndcg.mean for s in (bm25, model, teacher, second)]
    assert model.vs_bm25.mean == pytest.approx(means[1] - means[0])
    assert second.vs_teacher.mean == pytest.approx(means[3] - means[2])
    assert second.retention.mean == pytest.approx(means[3] / means[2])
    assert second.gain_retention.mean == pytest.approx((means[3] - means[0]) / (means[2] - means[0]))


def test_another_systems_run_is_a_row_beside_bm25_and_needs_no_model(done, tmp_path):
    folder, _, _ = done
    (data,) = read_result(folder).datasets
    (own,) = (folder / "runs").glob("demo-en@test-*/BM25_RM3-*.trec")
    queries = list(data.queries)
    part = tmp_path / "part.trec"
    part.write_text("".join(x + "\n" for x in own.read_text().splitlines() if x.split()[0] != queries[0]))
    config = BenchConfig(datasets=("demo-en",), runs=(f"theirs={own}", str(part)))
    result = read_result(bench(config, workdir=Workdir(tmp_path / "work")))
    _, rm3, theirs, less = result.datasets[0].systems
    assert (theirs.name, theirs.kind, less.name) == ("theirs", "run", "part.trec")
    assert theirs.per_query == rm3.per_query and theirs.vs_bm25 == rm3.vs_bm25
    assert less.per_query == rm3.per_query | {queries[0]: 0.0}
    assert result.warnings == ["part.trec lacks 1 query of demo-en@test, counted as nothing found"]
    told = notes(result.datasets[0], [], result)
    assert {f"theirs: the ranking in {own}.", f"part.trec: the ranking in {part}."} <= set(told)
    # Documents of another collection: nothing judged could be found among them.
    foreign = tmp_path / "foreign.trec"
    foreign.write_text("".join(f"{id} Q0 elsewhere-{n} 1 {9 - n} x\n" for id in queries for n in range(3)))
    of_foreign = msgspec.structs.replace(config, runs=(str(foreign),))
    result = read_result(bench(of_foreign, workdir=Workdir(tmp_path / "work")))
    assert result.warnings == ["foreign.trec: 3 of its 3 documents are not in demo-en@test"]
    assert result.datasets[0].systems[2].ndcg.mean == 0
    for line in ("q1 Q0 d1 1", "q1 Q0 d1 1 nan x"):
        part.write_text(f"{line}\n")
        with pytest.raises(BadInput, match=r"part.trec:1: not a line of a TREC run"):
            bench(config, workdir=Workdir(tmp_path / "work"))
    with pytest.raises(
        BadArgument, match=r"BM25: a row of ours has this name; name yours otherwise, as LABEL=FILE"
    ):
        bench(BenchConfig(datasets=("demo-en",), runs=(f"BM25={own}",)), workdir=Workdir(tmp_path / "work"))
    part.write_text("q1 Q0 d1 1 2.5 x\nq1 Q0 d1 2 2.0 x\n")
    with pytest.raises(BadInput, match=r"part.trec:2: has document d1 twice"):
        bench(config, workdir=Workdir(tmp_path / "work"))


def test_a_busy_machine_is_noted_before_the_work(done, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("qe_edge.bench.bench.busy", lambda: 0.9)
    result = read_result(bench(BenchConfig(datasets=("demo-en",)), workdir=Workdir(tmp_path)))
    assert result.machine["busy"] == 0.9
    assert result.warnings == ["other work took 90 % of the processors at the start: times say little"]
    assert "warning: other work took 90 %" in capsys.readouterr().err
    told = "Other work took 90 % of the processors at the start: the times say little."
    assert told not in markdown_table(result.datasets[0], ["ms"], result)  # nothing was timed
    result = msgspec.structs.replace(read_result(done[0]), machine=result.machine)
    (data,) = result.datasets
    assert told in markdown_table(data, ["ms"], result)
    assert told.replace("%", r"\%") in latex_table(data, ["ms"], result)
    assert told not in markdown_table(data, ["ndcg"], result)
    assert f"on demo-en@test, 26 queries, {result.label}." in latex_table(data, run=result)


def test_the_judgments_stand_beside_the_runs(done):
    folder, _, _ = done
    (file,) = (folder / "runs").glob("demo-en@test-*/qrels.txt")
    assert {
        (qrel.query_id, qrel.doc_id): qrel.relevance for qrel in ir_measures.read_trec_qrels(str(file))
    } == {(q, d): grade for q, grades in load_dataset("demo-en").qrels.items() for d, grade in grades.items()}


def test_per_query_values_are_trec_evals_on_the_written_runs(done):
    folder, _, _ = done
    (data,) = read_result(folder).datasets
    qrels = load_dataset("demo-en").qrels
    runs = sorted((folder / "runs").glob("demo-en@test-*/*.trec"))
    assert len(runs) == len(data.systems)
    for system in data.systems:
        slug = re.sub(r"[^\w.@-]+", "_", f"{system.name} {system.join}").strip("_")
        (run,) = [path for path in runs if path.name.rpartition("-")[0] == slug]
        values = dict.fromkeys(qrels, 0.0)
        loaded = list(ir_measures.read_trec_run(str(run)))
        values |= {m.query_id: m.value for m in ir_measures.iter_calc([ir_measures.nDCG @ 10], qrels, loaded)}
        assert values == pytest.approx(system.per_query)


def test_other_measures_are_trec_evals_too(done):
    folder, _, _ = done
    (data,) = read_result(folder).datasets
    qrels = load_dataset("demo-en").qrels
    run = next((folder / "runs").glob("demo-en@test-*/BM25-*.trec"))
    wanted = [ir_measures.R @ 100, ir_measures.AP]
    found = ir_measures.calc_aggregate(wanted, qrels, list(ir_measures.read_trec_run(str(run))))
    assert list(data.systems[0].measures) == ["R@100", "AP"]
    for measure in wanted:
        assert data.systems[0].measures[str(measure)].mean == pytest.approx(found[measure])


def test_a_gate_has_a_row_of_its_own(tiny_qwen3, tmp_path):
    """Helped and hurt with it and without it: what it holds back is searched as it is."""
    spec = read_spec(tiny_qwen3)
    data = load_dataset("demo-en")
    lengths = sorted(len(query.split()) for query in data.queries.values())
    gate = Gate(lengths[len(lengths) // 3], None, None, None, False)
    spec = msgspec.structs.replace(spec, gate=gate, join=Join("mass", 5))
    student = convert_gguf(tiny_qwen3, tmp_path / "student.gguf", spec=spec)
    config = BenchConfig(datasets=("demo-en",), models=(str(student),), budget_tokens=8)
    (found,) = read_result(bench(config, workdir=Workdir(tmp_path))).datasets
    plain, _, free, gated = found.systems
    assert (free.name, gated.name) == ("student.gguf", "student.gguf + gate")
    held = {query_id for query_id in free.expansions if gate.before(data.queries[query_id])}
    assert held and gated.expansions == {q: text for q, text in free.expansions.items() if q not in held}
    for query_id, value in gated.per_query.items():
        assert value == (plain if query_id in held else free).per_query[query_id]
    assert gated.helped + gated.hurt < free.helped + free.hurt
    assert gated.speed == free.speed


def test_budgets_cut_the_one_generation(done):
    """A budget's figure is that of the same tokens up to it, which greedy decoding would write again."""
    folder, work, _ = done
    (data,) = read_result(folder).datasets
    model = next(system for system in data.systems if system.name == "tiny")
    assert list(model.budgets) == [16]
    (generated,) = (folder / "generated").rglob("*.jsonl")
    rows = list(read_jsonl(generated, Generated))
    assert all(row.text.startswith(row.cut[16]) or "\ufffd" in row.cut[16] for row in rows if row.cut)
    index = Index.for_dataset(load_dataset("demo-en"), work.root / "index")
    run = retrieve(load_dataset("demo-en"), index, {r.query_id: r.at(16) for r in rows}, Join("mass", 0.5))
    assert model.budgets[16].mean == pytest.approx(mean(values_of(load_dataset("demo-en"), run)))


def test_p_values_are_corrected_for_the_systems_that_are_compared(done):
    folder, _, _ = done
    (data,) = read_result(folder).datasets
    bm25, *others = data.systems
    raw = []
    for system in others:
        raw.append(randomization_test([system.per_query[i] - bm25.per_query[i] for i in bm25.per_query]))
    assert [system.p_vs_bm25 for system in others] == pytest.approx(holm(raw))
    teacher = others[-1]
    assert teacher.p_vs_bm25 < 0.01 and teacher.p_vs_teacher is None


def test_the_join_is_chosen_on_other_queries(done, student, tmp_path):
    config = BenchConfig(
        datasets=("demo-en",),
        models=(f"tiny={student}",),
        tune_on="demo-en@train",
        tune_joins=("repeat:1", "mass:0.5", "repeat:50"),
        budget_tokens=4,
    )
    result = read_result(bench(config, workdir=Workdir(tmp_path)))
    (tuning,) = result.tuning
    assert (tuning.model, tuning.dataset) == ("tiny", "demo-en@train")
    means = {join: interval.mean for join, interval in tuning.curve.items()}
    assert list(means) == ["repeat:1", "mass:0.5", "repeat:50"]
    assert means[tuning.chosen] == max(means.values())
    assert result.datasets[0].systems[2].join == tuning.chosen
    for other in ("demo-en", "demo-en@test"):
        with pytest.raises(BadArgument, match="tune on others than those that are measured"):
            bench(msgspec.structs.replace(config, tune_on=other), workdir=Workdir(tmp_path / "none"))
    with pytest.raises(BadArgument, match="either --join or --tune-on"):
        bench(msgspec.structs.replace(config, joins=("mass:1",)), workdir=Workdir(tmp_path / "none"))


def test_rm3_takes_the_terms_of_the_best_documents():
    documents = [
        ("d1", "moon tide tide water"),
        ("d2", "moon tide sea"),
        ("d3", "bread yeast"),
        ("d4", "sea salt water water"),
        *((f"e{i}", f"filler{i} common") for i in range(40)),
    ]
    index = Index.build(documents, analyzer="english")
    data = Dataset("x", "", {"q": "moon"}, {"q": {"d4": 1}}, lambda: iter(documents))
    plain = {"q": index.search({"moon": 1.0}, k=10)}
    assert [doc_id for doc_id, _ in plain["q"]] == ["d2", "d1"]
    (s2, s1) = (score for _, score in plain["q"])
    # Each document's terms by their share in it times its score; the sum is one, half of it the query's.
    weights = {
        "moon": s1 / 4 + s2 / 3,
        "tide": s1 / 2 + s2 / 3,
        "water": s1 / 4,
        "sea": s2 / 3,
    }
    expected = {term: 0.5 * weight / (s1 + s2) for term, weight in weights.items()}
    expected["moon"] += 0.5
    found = rm3(data, index, plain, found_texts(data, plain), 10)["q"]
    assert dict(found) == pytest.approx(dict(index.search(expected, k=10)))
    assert [doc_id for doc_id, _ in found] == ["d2", "d1", "d4"]


def test_rm3_prunes_documents_terms_and_common_terms():
    """The eleventh document, a document's eleventh term and a term of every other document change nothing."""
    own = "moon " + " ".join(f"t{i} t{i}" for i in range(10)) + " rare"
    documents = [("d0", own + " common"), *((f"d{i}", "moon " * 2 + f"common u{i}") for i in range(1, 12))]
    documents += [(f"e{i}", "filler") for i in range(200)]
    index = Index.build(documents, analyzer="english")
    data = Dataset("x", "", {"q": "moon"}, {"q": {"d1": 1}}, lambda: iter(documents))
    plain = {"q": index.search({"moon": 1.0}, k=100)}
    assert plain["q"][-1][0] == "d0" and len(plain["q"]) == 12

    def feedback(run):
        return rm3(data, index, run, found_texts(data, run), 100)["q"]

    again = dict(feedback({"q": plain["q"][-1:]}))  # d0 alone is the feedback
    score = plain["q"][-1][1]
    assert score > 0
    # Ten terms of d0: the t's, which occur twice; `moon` once, `rare` once and `common` come too late.
    weights = {f"t{i}": 0.05 for i in range(10)} | {"moon": 0.5}
    assert again == pytest.approx(dict(index.search(weights, k=100)))
    assert feedback({"q": plain["q"][:11]}) == feedback({"q": plain["q"][:10]})


def test_a_model_that_reads_has_a_row_of_its_own(done, student, tmp_path):
    _, _, config = done
    config = msgspec.structs.replace(config, joins=(), teachers=(), feedback=True)
    folder = bench(config, workdir=Workdir(tmp_path / "work"))
    (data,) = read_result(folder).datasets
    systems = {system.name: system for system in data.systems}
    assert list(systems) == ["BM25", "BM25 + RM3", "tiny", "tiny + feedback"]
    row = systems["tiny + feedback"]
    assert (row.kind, row.join, row.failed) == ("model", "mass:3", 0)
    assert row.speed.decode_tokens_per_s is None
    assert row.speed.mean_tokens == 0
    assert row.speed.prefill_tokens_per_s > 0
    # What an Expander finds with the same passages.
    loaded = load_dataset("demo-en")
    index = Index.for_dataset(loaded, tmp_path / "index")
    plain = retrieve(loaded, index, {}, Join())
    texts = found_texts(loaded, plain)
    with Expander.load(student) as expander:
        run = {
            query_id: index.search(expander.feedback(query, texts[query_id]).terms(), k=1000)
            for query_id, query in loaded.queries.items()
        }
    assert values_of(loaded, run) == pytest.approx(row.per_query)
    line = next(line for line in markdown_table(data).splitlines() if "tiny + feedback" in line)
    assert line.split("|")[6].strip() == "–"  # tokens/s: it writes none; no teacher, no columns of one

    fewer = msgspec.structs.replace(config, passages=3)
    (data,) = read_result(bench(fewer, workdir=Workdir(tmp_path / "work"))).datasets
    (row,) = [system for system in data.systems if system.name == "tiny + feedback 3"]
    with Expander.load(student, passages=3) as expander:
        run = {
            query_id: index.search(expander.feedback(query, texts[query_id]).terms(), k=1000)
            for query_id, query in loaded.queries.items()
        }
    assert values_of(loaded, run) == pytest.approx(row.per_query)
    assert row.per_query != systems["tiny + feedback"].per_query


def test_a_row_for_write_search_read_search_by_each_reader(done, student, tmp_path):
    _, _, config = done
    encoder = save_tiny_encoder(tmp_path / "tiny-encoder.gguf")
    config = msgspec.structs.replace(
        config,
        joins=(),
        teachers=(),
        refine=True,
        readers=("itself", str(encoder)),
        passages=4,
        budget_tokens=20,
    )
    work = Workdir(tmp_path / "work")
    folder = bench(config, workdir=work)
    (data,) = read_result(folder).datasets
    systems = {system.name: system for system in data.systems}
    names = ["tiny + refine 4", "tiny + refine 4 by tiny-encoder"]
    assert [name for name in systems if "refine" in name] == names
    assert systems[names[0]].per_query != systems[names[1]].per_query
    row = systems[names[1]]
    assert (row.join, row.failed) == ("mass:0.7 + mass:3", 0)
    assert row.speed.prefill_tokens_per_s is None and row.speed.decode_tokens_per_s > 0
    collection = Collection.open("demo-en", tmp_path / "index")
    found = partial(collection.found, most=4)
    loaded = load_dataset("demo-en")
    with Expander.load(student, reader=encoder, passages=4, budget_tokens=20, gate=OPEN) as expander:
        run = {
            query_id: collection.index.search(expander.refine(query, found).terms(), k=1000)
            for query_id, query in loaded.queries.items()
        }
    assert values_of(loaded, run) == pytest.approx(row.per_query)
    # Kept for the next time, under what was read and who read it.
    again = bench(config, workdir=work)
    kept = read_result(again).datasets[0].systems[-1].speed
    assert kept.ms_per_query_p50 == row.speed.ms_per_query_p50
    assert (
        row.speed.file_mb
        == pytest.approx(kept.file_mb)
        == (student.stat().st_size + encoder.stat().st_size) / 1e6
    )


def test_an_interrupted_bench_keeps_what_was_generated(done, student, tmp_path):
    folder, _, _ = done
    written = next((folder / "generated").rglob("*.jsonl")).read_bytes().splitlines(keepends=True)
    request = Task(
        model=str(student), lang="en", queries=load_dataset("demo-en").queries, out=str(tmp_path / "g.jsonl"),
        label="again", budget_tokens=20, key=msgspec.json.decode(written[0])["key"],
    )  # fmt: skip
    marked = written[0].replace(b'"text":"', b'"text":"KEPT ', 1)
    (tmp_path / "g.jsonl").write_bytes(marked + b"".join(written[1:20]))
    rows, _, _ = generate(request)
    assert rows[0].text.startswith("KEPT ")
    assert [row.query_id for row in rows] == list(request.queries)
    # What was timed then was timed on another occasion.
    (tmp_path / "g.jsonl").unlink()
    rows, speed, _ = generate_once(request, "digest", tmp_path / "cache")
    assert not speed.reused
    (tmp_path / "cache" / f"{rows[0].key}.jsonl").unlink()
    _, speed, _ = generate_once(request, "digest", tmp_path / "cache")
    assert speed.reused


def test_what_an_earlier_bench_wrote_is_not_written_again(student, tmp_path, capsys):
    config = BenchConfig(datasets=("demo-en",), models=(f"one={student}",), budget_tokens=2)
    work = Workdir(tmp_path)

    def generated(**changed):
        folder = bench(msgspec.structs.replace(config, **changed), workdir=work)
        (file,) = folder.glob("generated/*/*.jsonl")
        return file.read_bytes()

    first = generated()
    assert "of an earlier run" not in capsys.readouterr().err
    # The times, too, are those of the first.
    assert generated(models=(f"two={student}",), joins=("mass:2",)) == first
    assert "two on demo-en@test: texts and times of an earlier run; delete " in capsys.readouterr().err
    assert "Times measured in an earlier run, at least in part, and under its load: two." in console_table(
        read_result(work.newest("bench"))
    )
    assert generated(budget_tokens=3) != first
    other = tmp_path / "other.gguf"
    other.write_bytes(student.read_bytes() + b"\0")
    assert generated(models=(f"one={other}",)) != first
    assert len(list((tmp_path / "generations").iterdir())) == 3


def test_fewer_queries_are_the_same_for_every_row_and_said(student, tmp_path):
    config = BenchConfig(
        datasets=("demo-en",),
        models=(str(student),),
        teachers=tuple(default_teachers(["demo-en"])),
        budget_tokens=2,
        max_queries=7,
    )
    folder = bench(config, workdir=Workdir(tmp_path))
    (data,) = read_result(folder).datasets
    assert data.info.queries == len(data.queries) == 7
    assert data.queries.items() < load_dataset("demo-en").queries.items()
    assert {len(system.per_query) for system in data.systems} == {7}
    assert {system.kind for system in data.systems} == {"bm25", "feedback", "model", "teacher"}
    assert "7 of the 26 queries of demo-en@test, drawn at random" in data.warnings
    (qrels,) = folder.glob("runs/*/qrels.txt")
    assert {line.split()[0] for line in qrels.read_text().splitlines()} == data.queries.keys()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_benchs_child_ends_too(student, tmp_path, how):
    """Or it would go on writing to the file that the next run goes on with."""
    import psutil

    command = [sys.executable, "-m", "qe_edge", "bench", "-d", "demo-en", "-m", str(student)]
    process = subprocess.Popen([*command, "--workdir", str(tmp_path)], stderr=subprocess.DEVNULL)
    while not list(tmp_path.rglob("generated/*/*.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    process.send_signal(how)
    assert process.wait() == (-how if how == signal.SIGKILL else 143)
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert gone and not alive
    again = subprocess.run([*command, "--workdir", str(tmp_path)], capture_output=True, text=True, check=True)
    assert again.stderr.count("bench: going on with what an interrupted run wrote") == 1


def test_a_failing_model_leaves_the_others(student, tmp_path):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(student.read_bytes()[:5000])
    config = BenchConfig(datasets=("demo-en",), models=(str(broken), str(student)), budget_tokens=2)
    result = read_result(bench(config, workdir=Workdir(tmp_path)))
    assert [s.name for s in result.datasets[0].systems] == ["BM25", "BM25 + RM3", "student-F16.gguf"]
    (failure,) = result.failures
    assert "broken.gguf on demo-en@test: " in failure
    assert "damaged or truncated" in failure

    with pytest.raises(QeEdgeError, match="every model failed"):
        bench(BenchConfig(datasets=("demo-en",), models=(str(broken),)), workdir=Workdir(tmp_path / "none"))
    assert not (tmp_path / "none" / "bench" / "001").exists()


def test_labels_and_collections_of_one_name_do_not_share_generations(student, tmp_path):
    for name, query in (("one", "tides"), ("two", "bread")):
        qrels = tmp_path / name / "tiny" / "qrels"
        qrels.mkdir(parents=True)
        (qrels.parent / "corpus.jsonl").write_text('{"_id": "d1", "text": "tides bread"}\n')
        (qrels.parent / "queries.jsonl").write_text(json.dumps({"_id": "q1", "text": query}) + "\n")
        (qrels / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    config = BenchConfig(
        datasets=(str(tmp_path / "one" / "tiny"), str(tmp_path / "two" / "tiny")),
        models=(f"a+b={student}", f"a b={student}"),
        budget_tokens=2,
    )
    folder = bench(config, workdir=Workdir(tmp_path))
    assert len(list(folder.glob("generated/*/*.jsonl"))) == 4
    assert len(list(folder.glob("runs/*/*.trec"))) == 8


def test_the_peak_memory_is_the_childs_own(student, tmp_path):
    ballast = bytearray(600_000_000)
    request = Task(model=str(student), lang="en", queries={"q": "x"}, out=str(tmp_path / "g"), label="x")
    _, speed, _ = generate(request)
    assert len(ballast) == 600_000_000
    assert student.stat().st_size / 1e6 < speed.peak_memory_mb < 500


def test_a_dying_process_is_an_error_not_a_hang(student, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    request = Task(model=str(student), lang="en", queries={"q": "x"}, out=str(tmp_path / "g"), label="x")
    with pytest.raises(QeEdgeError, match="died"):
        generate(request)


def test_a_model_is_not_run_on_a_language_it_does_not_speak(student, tmp_path, tiny_llama):
    import msgspec

    spec = read_spec(tiny_llama)
    english = msgspec.structs.replace(
        spec, prompt=msgspec.structs.replace(spec.prompt, texts={"en": spec.prompt.texts["en"]})
    )
    model = convert_gguf(tiny_llama, tmp_path / "english.gguf", dtype="f16", spec=english)
    folder = bench(BenchConfig(datasets=("demo-zh",), models=(str(model),)), workdir=Workdir(tmp_path))
    result = read_result(folder)
    assert [s.name for s in result.datasets[0].systems] == ["BM25", "BM25 + RM3"]
    assert result.warnings == ["english.gguf was not run on demo-zh@test: it speaks en only"]
    # In a report, too, it is told from one that was forgotten.
    assert f"{result.label}: {result.warnings[0]}." in report([folder], tmp_path / "report.html").read_text()
    assert f"{result.warnings[0]}." in markdown_table(result.datasets[0])
    write_spec(tmp_path, english)
    with pytest.raises(
        BadArgument, match=r"knows en only, and demo-zh@test is in zh; name another --dataset"
    ):
        check_language(tmp_path, load_dataset("demo-zh"))


def test_too_long_queries_are_counted_and_searched_as_they_are(student, tmp_path):
    collection = tmp_path / "long"
    (collection / "qrels").mkdir(parents=True)
    (collection / "corpus.jsonl").write_text('{"_id": "d1", "text": "tides"}\n')
    queries = {"q1": "tides " * 4000, "q2": "tides"}
    (collection / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": key, "text": text}) + "\n" for key, text in queries.items())
    )
    (collection / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t1\n")
    folder = bench(
        BenchConfig(datasets=(str(collection),), models=(str(student),), budget_tokens=2),
        workdir=Workdir(tmp_path),
    )
    model = read_result(folder).datasets[0].systems[2]
    assert model.failed == 1
    assert model.per_query["q1"] == 1.0


def test_model_labels(student, tiny_qwen3):
    assert parse_model(str(student)) == ("student-F16.gguf", str(student))
    assert parse_model(f"before DPO={student}") == ("before DPO", str(student))
    with pytest.raises(NotFound):
        parse_model("nothing.gguf")
    with pytest.raises(BadArgument, match=r"--run mine= names no file; write FILE or LABEL=FILE"):
        parse_run("mine=")
    numbered = tiny_qwen3.with_name("merge") / "001"
    numbered.parent.mkdir()
    numbered.symlink_to(tiny_qwen3)
    assert parse_model(str(numbered)) == ("merge 001", str(numbered))


def test_the_newest_exports_models_are_its_ggufs_or_else_its_mlx_folders(tmp_path):
    work, newest = Workdir(tmp_path), tmp_path / "export" / "001"
    (newest / "student-mlx-5bit").mkdir(parents=True)
    assert default_models(work) == [str(newest / "student-mlx-5bit")]
    (newest / "student-Q4_K_M.gguf").touch()
    assert default_models(work) == [str(newest / "student-Q4_K_M.gguf")]
    (tmp_path / "export" / "002").mkdir()
    with pytest.raises(BadInput, match=r"002: the newest export holds no model; name one with --model$"):
        default_models(work)


def test_queries_that_a_model_was_trained_on_are_said(student, tmp_path):
    data = load_dataset("demo-en")
    known, marked, paired, *_ = data.queries.values()
    rows = [
        Expansion("demo-en", "1", known, "en", "big", "zero-shot", "a text"),
        Expansion("demo-en", "2", marked, "en", "big", "zero-shot", "a text", problem="cut"),
    ]
    pair = Pair("demo-en", "3", paired, "en", "moon", "bread", 1, 0, 1, 0, *["big", "zero-shot"] * 2)
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl(rows))
    (tmp_path / "pairs.jsonl").write_bytes(encode_jsonl([pair]))
    made_from = {
        "sft": ("train sft", {"expansions[0]": tmp_path / "expansions.jsonl"}),
        "dpo": ("train dpo", {"adapter": tmp_path / "sft", "pairs": tmp_path / "pairs.jsonl"}),
        "merge": ("merge", {"adapter": tmp_path / "dpo"}),
        "export": ("export", {"model": tmp_path / "merge"}),
    }
    for name, (command, inputs) in made_from.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "run.json", run_record(command, {}, inputs))
    exported = tmp_path / "export" / "student.gguf"
    exported.symlink_to(student)
    assert learnt_by_model(str(exported)) == {known, paired}
    assert learnt_by_model(str(student)) == set()
    added = msgspec.structs.replace(rows[0], query="asked later")  # as `teach` adds
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl([*rows, added]))
    assert learnt_by_model(str(exported)) == {known, paired, "asked later"}
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl([added, *rows]))
    assert learnt_by_model(str(exported)) == {paired}
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl(rows))
    config = BenchConfig(datasets=("demo-en",), models=(str(exported),), budget_tokens=2)
    result = read_result(bench(config, workdir=Workdir(tmp_path)))
    known_ones = "2 of the 26 queries of demo-en@test"
    warning = f"student.gguf was trained on {known_ones}, so that its figures say little of others"
    assert result.warnings == [warning]
    assert f"{warning}." in " ".join(console_table(result).split())


def test_what_cannot_work_is_refused_before_any_work(student, tmp_path):
    work = Workdir(tmp_path)
    with pytest.raises(BadArgument, match="two models have the same name"):
        bench(BenchConfig(datasets=("demo-en",), models=(str(student), str(student))), workdir=work)
    with pytest.raises(BadArgument, match="can't read the join"):
        bench(BenchConfig(datasets=("demo-en",), joins=("much",)), workdir=work)
    with pytest.raises(BadArgument, match="at least one data set"):
        bench(BenchConfig(datasets=()), workdir=work)
    assert not (tmp_path / "bench").exists()


def test_a_result_file_that_is_none_is_named(tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(BadInput, match="not a bench result"):
        read_result(tmp_path)
    with pytest.raises(NotFound, match="no such bench result"):
        read_result(tmp_path / "nowhere.json")


def test_the_child_prints_one_json_object_whatever_the_engine_says(student, tmp_path):
    import msgspec

    request = Task(
        model=str(student), lang="en", queries={"q": "x"}, out=str(tmp_path / "g"), label="x", budget_tokens=1
    )
    child = subprocess.run(
        [sys.executable, "-m", "qe_edge.bench.child", "qe_edge.bench.speed", "work"],
        input=msgspec.json.encode(request), capture_output=True, check=True, env=os.environ,
    )  # fmt: skip
    assert json.loads(child.stdout)["value"]["load_s"] > 0


def test_of_a_teacher_that_was_asked_again_the_last_answers_count(tmp_path):
    data = load_dataset("demo-en")
    first, second = list(data.queries)[:2]
    answers = [
        (first, "bad", 0),
        (first, "another candidate", 1),
        (second, "imported", None),
        (second, "imported too", None),
        (first, dict(data.documents())[max(data.qrels[first], key=data.qrels[first].get)], 0),
    ]
    rows = [
        Expansion("demo-en", id, data.queries[id], "en", "big", "few-shot", text, sample=sample)
        for id, text, sample in answers
    ]
    file = tmp_path / "teacher.jsonl"
    file.write_bytes(encode_jsonl(rows))
    out = bench(BenchConfig(datasets=("demo-en",), teachers=(str(file),)), workdir=Workdir(tmp_path / "work"))
    result = read_result(out)
    assert result.datasets[0].teacher == "big few-shot"  # there is no other
    told = "big few-shot was asked again about demo-en@test; without 1 earlier answer"
    assert told in result.warnings
    teacher = result.datasets[0].systems[2]
    assert teacher.expansions == {first: answers[-1][1], second: "imported"}


def test_a_teacher_that_wrote_for_some_queries_is_no_measure_of_others(tmp_path):
    data = load_dataset("demo-en")
    best = {id: dict(data.documents())[max(grades, key=grades.get)] for id, grades in data.qrels.items()}
    few = list(data.queries)[: len(data.queries) // 2]
    rows = [Expansion("demo-en", id, data.queries[id], "en", "few", "zero-shot", best[id]) for id in few]
    rows += [Expansion("demo-en", id, q, "en", "all", "zero-shot", q) for id, q in data.queries.items()]
    file = tmp_path / "teachers.jsonl"
    file.write_bytes(encode_jsonl(rows))
    config = BenchConfig(datasets=("demo-en",), teachers=(str(file),))
    (result,) = read_result(bench(config, workdir=Workdir(tmp_path / "work"))).datasets
    systems = {system.name: system for system in result.systems}
    assert systems["few zero-shot"].ndcg.mean > systems["all zero-shot"].ndcg.mean
    assert (result.teacher, systems["few zero-shot"].failed) == ("all zero-shot", 13)


def test_a_teachers_unusable_answers_count_as_the_plain_query(tmp_path):
    data = load_dataset("demo-en")
    first, second, third = list(data.queries)[:3]
    answer = dict(data.documents())[max(data.qrels[third], key=data.qrels[third].get)]
    texts = {first: ("", "refused"), second: ("anything at all", "wrong language"), third: (answer, "cut")}
    rows = [
        Expansion(
            "demo-en", query_id, data.queries[query_id], "en", "big", "zero-shot", text, problem=problem
        )
        for query_id, (text, problem) in texts.items()
    ]
    file = tmp_path / "teacher.jsonl"
    file.write_bytes(encode_jsonl(rows))
    out = bench(BenchConfig(datasets=("demo-en",), teachers=(str(file),)), workdir=Workdir(tmp_path / "work"))
    result = read_result(out)
    assert any(
        "1 of 3 texts of big zero-shot on demo-en@test were cut where `teach` ended them" in w
        for w in result.warnings
    )
    bm25, _, teacher = result.datasets[0].systems
    assert teacher.failed == 25
    assert {q: teacher.per_query[q] for q in (first, second)} == {
        q: bm25.per_query[q] for q in (first, second)
    }
    assert teacher.per_query[third] > bm25.per_query[third]
