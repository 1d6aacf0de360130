"""Evaluation by retrieval during training: what is kept, what it leaves alone, and what is logged."""

import json
import shutil

import pytest
from training import DEV, SMALL, evaluations, losses, run_sft, train_until_killed

from qe_edge.errors import BadArgument
from qe_edge.student.join import Join
from qe_edge.student.spec import read_spec
from qe_edge.train.config import SftConfig
from qe_edge.train.hardware import Hardware
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
import torch

from qe_edge.train.base_model import load_tokenizer, load_trained, open_trained
from qe_edge.train.dev import DevSet
from qe_edge.train.sft import sft

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = Hardware("cpu", "float32", 1, "a CPU")


@pytest.fixture(scope="module")
def evaluated(tiny_qwen3, data, tmp_path_factory):
    work = tmp_path_factory.mktemp("evaluated")
    return run_sft(tiny_qwen3, data, work, **EVALUATED)


EVALUATED = {
    "epochs": 3,
    "learning_rate": 5e-3,
    "eval_dataset": DEV,
    "eval_steps": 2,
    "eval_queries": 12,
    "eval_join": "mass:5",
}


def test_the_best_checkpoint_by_retrieval_is_kept(evaluated, tiny_qwen3, data, tmp_path):
    found = evaluations(evaluated)
    assert list(found) == [0, 2, 4, 6]
    kept = read_record(evaluated)["kept"]
    assert kept["ndcg"] == max(found.values())
    assert kept["step"] == max(step for step, ndcg in found.items() if ndcg == kept["ndcg"])
    # The weights in the folder are those: they give the same figure again.
    trained = open_trained(evaluated)
    dev = DevSet(
        DEV,
        trained.spec,
        load_tokenizer(trained.base),
        CPU,
        join=Join("mass", 5),
        count=12,
        seed=0,
        workdir=Workdir(tmp_path),
        batch=8,
    )
    assert dev.ndcg(load_trained(trained, dtype=torch.float32)) == pytest.approx(kept["ndcg"], abs=1e-9)
    assert not (evaluated / "best").exists() and not (evaluated / "best.json").exists()


def test_evaluation_is_what_the_expander_and_the_bench_would_give(tiny_qwen3, tmp_path):
    """The same expansions one by one, and the same nDCG@10 through the bench's own functions."""
    from qe_edge import Expander
    from qe_edge.bench.quality import retrieve, values_of
    from qe_edge.retrieval.measures import mean
    from qe_edge.student.gate import OPEN

    spec, tokenizer = read_spec(tiny_qwen3), load_tokenizer(str(tiny_qwen3))
    dev = DevSet(DEV, spec, tokenizer, CPU, join=Join("mass", 5), count=6, seed=1, workdir=Workdir(tmp_path))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, dtype=torch.float32)
    texts = dev._expand(model)
    with Expander.load(tiny_qwen3, engine="transformers", gate=OPEN) as expander:
        singly = {query_id: expander.expand(query).text for query_id, query in dev.data.queries.items()}
    same = [query_id for query_id in texts if " ".join(texts[query_id].split()) == singly[query_id]]
    assert len(same) >= 5  # a random model has near ties, which padding may tip
    run = retrieve(dev.data, dev.index, texts, Join("mass", 5), depth=10)
    assert len(run) == 6
    assert dev.ndcg(model) == pytest.approx(mean(values_of(dev.data, run)))


def test_evaluation_does_not_change_what_is_trained(evaluated, tiny_qwen3, data, tmp_path):
    plain = run_sft(tiny_qwen3, data, tmp_path, **{**EVALUATED, "eval_dataset": ""})
    assert losses(plain) == losses(evaluated)
    assert len(losses(plain)) == 6


def test_a_dev_set_in_another_language_is_refused(tiny_llama, data, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_llama, student)
    spec = json.loads((student / "qe_edge.json").read_text())
    del spec["prompt"]["texts"]["zh"]
    (student / "qe_edge.json").write_text(json.dumps(spec))
    with pytest.raises(BadArgument, match="its queries are in zh, the student speaks en"):
        run_sft(student, data, tmp_path, eval_dataset="demo-zh@train")


def test_a_killed_evaluated_run_goes_on_to_the_same_end(evaluated, tiny_qwen3, data, tmp_path):
    config = SftConfig(student=str(tiny_qwen3), **{**SMALL, **EVALUATED})
    train_until_killed(5, config, tmp_path, data / "expansions.jsonl")
    partial = tmp_path / "sft" / "001.partial"
    assert (partial / "checkpoint-4").is_dir()
    assert (partial / "log.jsonl").read_text().count("eval_ndcg") == 3
    resumed = sft([data / "expansions.jsonl"], config, workdir=Workdir(tmp_path))
    assert losses(resumed) == pytest.approx(losses(evaluated), abs=1e-5)
    assert evaluations(resumed) == pytest.approx(evaluations(evaluated))
    assert read_record(resumed)["kept"] == pytest.approx(read_record(evaluated)["kept"])


def test_log_picture_and_tensorboard_are_in_the_folder(tiny_qwen3, data, tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("vl_convert")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run_sft(tiny_qwen3, data, tmp_path, epochs=2, tensorboard=True)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(folder))
