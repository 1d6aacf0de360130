"""SFT, DPO and merge with real TRL on a tiny Qwen3."""

import math
import os
import shutil
import signal
import subprocess
import sys

import msgspec
import pytest
from training import run_sft

from qe_edge.errors import BadArgument, BadInput, QeEdgeError
from qe_edge.records import Expansion, Pair, encode_jsonl
from qe_edge.student.feedback import Feedback
from qe_edge.student.prompt import hugging_face, prompt_for
from qe_edge.student.spec import read_spec, write_spec
from qe_edge.work.files import write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import read_record

pytest.importorskip("trl")
from qe_edge.train.config import DpoConfig, SftConfig
from qe_edge.train.dpo import dpo, encode_pairs
from qe_edge.train.merge import merge
from qe_edge.train.sft import encode_rows, select_rows, sft

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = (
    "the moon pulls the sea",
    "yeast makes gas in dough",
    "cold air holds less water",
    "rust is iron and oxygen",
)


def rows(count=8):
    return [
        Expansion(
            "tiny", f"q{i}", f"query number {i}", "en", "teacher", "zero-shot", TEXTS[i % 4] + f" case {i}"
        )
        for i in range(count)
    ]


def preferences(count=8):
    return [
        Pair(
            "tiny", f"q{i}", f"query number {i}", "en", TEXTS[i % 4], TEXTS[(i + 1) % 4], 1.0, 0.0, 1.0, 0.0,
            "teacher", "zero-shot", "teacher", "few-shot",
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "expansions.jsonl").write_bytes(encode_jsonl(rows()))
    (tmp_path / "pairs.jsonl").write_bytes(encode_jsonl(preferences()))
    return tmp_path


def sft_config(student, **settings):
    defaults = {"rank": 4, "alpha": 8, "epochs": 2, "batch_size": 2, "accumulate": 1, "logging_steps": 1}
    # Where a processor has bfloat16, two processes agree to three digits only.
    defaults["precision"] = "float32"
    return SftConfig(student=str(student), **{**defaults, "save_steps": 2, **settings})


DPO = DpoConfig(batch_size=2, accumulate=1, logging_steps=1, save_steps=2, learning_rate=1e-3, epochs=2)


@pytest.fixture(scope="module")
def trained(tiny_qwen3, tmp_path_factory):
    """An SFT adapter on the tiny Qwen3."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "expansions.jsonl").write_bytes(encode_jsonl(rows()))
    return sft([folder / "expansions.jsonl"], sft_config(tiny_qwen3), workdir=Workdir(folder))


def log_of(folder):
    return [msgspec.json.decode(line) for line in (folder / "log.jsonl").read_bytes().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in log_of(folder) if "loss" in entry]


def test_the_ids_trained_on_are_prompt_expansion_and_one_end_token(tiny_qwen3):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    spec = read_spec(tiny_qwen3)
    (row,), dropped = encode_rows(rows(1), spec, hugging_face(tokenizer), 512)
    assert (
        tokenizer.decode(row["input_ids"])
        == spec.prompt.render("query number 0") + TEXTS[0] + " case 0<|im_end|>"
    )
    trained_on = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(trained_on) == TEXTS[0] + " case 0<|im_end|>"
    assert row["labels"][-len(trained_on) :] == trained_on == row["input_ids"][-len(trained_on) :]
    assert not dropped


def test_to_read_is_trained_with_the_query_as_the_answer_to_the_expansions_beginning(tiny_qwen3):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    tokenize, spec = hugging_face(tokenizer), read_spec(tiny_qwen3)
    spec = msgspec.structs.replace(spec, feedback=Feedback(tokens=5))
    written, read = encode_rows(rows(1), spec, tokenize, 512, ("write", "read"))[0]
    assert written == encode_rows(rows(1), spec, tokenize, 512)[0][0]
    beginning = tokenizer.decode(tokenize(TEXTS[0], False)[:5])
    text = spec.feedback.texts["en"]
    prompt = "".join(p.text for p in spec.prompt.chat(text.system, text.user.format(passage=beginning)))
    assert tokenizer.decode(read["input_ids"]) == prompt + "query number 0<|im_end|>"
    assert tokenizer.decode([t for t in read["labels"] if t != -100]) == "query number 0<|im_end|>"


def test_a_student_that_only_reads_has_no_texts_to_choose_a_checkpoint_by(files, tmp_path):
    config = SftConfig(tasks=("read",), eval_dataset="demo-en")
    with pytest.raises(BadArgument, match="--task write"):
        sft([files / "expansions.jsonl"], config, workdir=Workdir(tmp_path))
    with pytest.raises(ValueError, match="twice"):
        SftConfig(tasks=("read", "read"))


def test_rows_that_cannot_be_used_are_counted_not_cut(tiny_qwen3):
    spec = read_spec(tiny_qwen3)
    short, *_ = rows(1)
    many = [short, short, Expansion("t", "q", "q", "en", "m", "zero-shot", " "), *rows(3)[1:]]
    size = len(spec.prompt.encode(short.query, byte_ids)) + len(
        spec.prompt.encode_answer(short.text, byte_ids)
    )
    encoded, dropped = encode_rows(many, spec, byte_ids, size)
    assert len(encoded) == 1
    assert dropped == {"duplicate": 1, "empty": 1, "too long": 2}


def test_an_answer_is_learnt_up_to_the_budget_which_the_student_then_keeps(tiny_qwen3, data, tmp_path):
    spec = read_spec(tiny_qwen3)
    short = msgspec.structs.replace(spec, prompt=msgspec.structs.replace(spec.prompt, max_tokens=4))
    (whole,), (cut,) = (encode_rows(rows(1), given, byte_ids, 2000)[0] for given in (spec, short))
    start = whole["labels"].count(-100)
    assert cut["input_ids"] == whole["input_ids"][: start + 4]  # without an end
    assert cut["labels"] == whole["labels"][: start + 4]
    trained = run_sft(tiny_qwen3, data, tmp_path, budget_tokens=7, epochs=1)
    assert read_spec(trained).prompt.max_tokens == 7


def byte_ids(text, special):
    return list(text.encode())


def test_rows_are_selected_by_model_and_mode_and_drawn_by_seed():
    extra = [
        Expansion("tiny", "q0", "query number 0", "en", "other", "few-shot", f"text {i}") for i in range(9)
    ]
    texts = [*rows(2), *extra]
    assert len(select_rows(texts, SftConfig())) == 11
    assert [r.model for r in select_rows(texts, SftConfig(teacher_models=("teacher",)))] == ["teacher"] * 2
    assert len(select_rows(texts, SftConfig(modes=("few-shot",)))) == 9
    drawn = select_rows(texts, SftConfig(max_rows=5))
    assert len({row.text for row in drawn}) == 5
    assert (
        drawn
        == select_rows(texts, SftConfig(max_rows=5))
        != select_rows(texts, SftConfig(max_rows=5, seed=1))
    )
    with pytest.raises(BadInput, match="the files hold: other few-shot, teacher zero-shot"):
        select_rows(texts, SftConfig(teacher_models=("nobody",)))
    texts = [msgspec.structs.replace(row, problem="cut") for row in rows(2)]
    with pytest.raises(BadInput, match=r"as `teach` marked them: cut \(2\); --accept cut takes those"):
        select_rows(texts, SftConfig())


def test_sft_learns_and_leaves_a_whole_folder(trained):
    curve = losses(trained)
    assert len(curve) == 8
    assert curve[-1] < curve[0]
    record = read_record(trained)
    assert (record["rows"], record["dropped"]) == (8, {})
    assert record["inputs"]["expansions[0]"]["sha256"]
    assert read_spec(trained).stage == "sft"
    assert not list(trained.glob("checkpoint-*"))
    assert not trained.with_name(trained.name + ".partial").exists()


def test_lora_leaves_the_embeddings_and_the_output_alone(trained):
    from safetensors import safe_open

    with safe_open(trained / "adapter_model.safetensors", "pt") as adapter:
        names = set(adapter.keys())
    assert len(names) == 2 * 7 * 2  # layers × linear layers × (A, B)
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_dpo_starts_from_the_sft_model_as_its_reference_and_learns(trained, files):
    folder = dpo(files / "pairs.jsonl", trained, DPO, workdir=Workdir(files))
    log = [entry for entry in log_of(folder) if "loss" in entry]
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]
    assert read_spec(folder).stage == "dpo"
    assert not (folder / "ref").exists()

    merged = merge(folder, workdir=Workdir(files))
    assert read_record(merged)["checks"]["logit_cosine"] > 0.999
    assert read_spec(merged).stage == "dpo"


def test_pairs_that_cannot_be_used_are_counted(tiny_qwen3):
    spec = read_spec(tiny_qwen3)
    good, *_ = preferences(1)
    equal = msgspec.structs.replace(good, rejected=good.chosen + " ")
    empty = msgspec.structs.replace(good, rejected="")
    long = msgspec.structs.replace(good, query="x" * 5000)
    encoded, dropped = encode_pairs([good, equal, empty, long], spec, byte_ids, 1000)
    assert len(encoded) == 1
    assert dropped == {"equal sides": 1, "empty": 1, "too long": 1}
    # Texts are cut where the student would end them, and may then be equal.
    short = msgspec.structs.replace(spec, prompt=msgspec.structs.replace(spec.prompt, max_tokens=4))
    (cut,), _ = encode_pairs([good], short, byte_ids, 1000)
    assert (len(cut["chosen_ids"]), len(cut["rejected_ids"])) == (4, 4)
    begun = msgspec.structs.replace(good, rejected=good.chosen[:8] + " differently")
    assert begun.chosen != begun.rejected
    assert encode_pairs([good, begun], short, byte_ids, 1000)[1] == {"equal sides": 1}
    with pytest.raises(BadInput, match="no pair is left"):
        encode_pairs([equal], spec, byte_ids, 1000)


def test_a_merged_student_keeps_its_precision_and_can_carry_another_join(trained, tiny_qwen3, files):
    from transformers import AutoConfig

    from qe_edge.student.join import Join

    merged = merge(trained, join=Join("mass", 2), workdir=Workdir(files))
    assert read_spec(merged).join == Join("mass", 2)
    assert AutoConfig.from_pretrained(merged).dtype == AutoConfig.from_pretrained(tiny_qwen3).dtype
    assert (merged / "tokenizer.json").is_file()
    assert "library_name: transformers" in (merged / "README.md").read_text()
    with pytest.raises(BadInput, match="is a merged model, no longer an adapter: `qe-edge export` takes it"):
        merge(merged, workdir=Workdir(files))


def test_what_was_left_out_was_not_learnt_from(tiny_qwen3, files, capsys):
    student = files / "student"
    shutil.copytree(tiny_qwen3, student)
    spec = read_spec(student)
    write_spec(
        student,
        msgspec.structs.replace(
            spec, prompt=msgspec.structs.replace(spec.prompt, texts={"en": spec.prompt.texts["en"]})
        ),
    )
    chinese = Expansion("chinese", "1", "潮汐", "zh", "teacher", "zero-shot", "月球引力")
    (files / "zh.jsonl").write_bytes(encode_jsonl([chinese]))
    taken = [files / "expansions.jsonl", files / "zh.jsonl"]
    folder = sft(taken, sft_config(student, max_steps=1), workdir=Workdir(files))
    assert read_record(folder)["learnt"] == ["tiny"]
    said = "sft: 8 rows from 8 queries; dropped 1 (in a language that the student doesn't know)"
    assert said in capsys.readouterr().err
    tested = files / "teach" / "tiny@test" / "expansions.jsonl"
    tested.parent.mkdir(parents=True)
    shutil.copy(files / "expansions.jsonl", tested)
    write_json(tested.parent / "run.json", {"command": "teach", "settings": {"dataset": "tiny@test"}})
    of_test = sft([tested], sft_config(student, max_steps=1), workdir=Workdir(files))
    assert read_record(of_test)["learnt"] == ["tiny@test"]
    assert "sft: texts for the test queries of tiny: what is measured on them says" in capsys.readouterr().err


def test_a_merged_model_that_lost_its_adapter_is_refused(trained, files, monkeypatch):
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(QeEdgeError, match=r"merged, the model's logits differ .* nothing was written"):
        merge(trained, workdir=Workdir(files))
    assert not (files / "merge").exists() or not list((files / "merge").glob("[!.]*"))


def test_the_same_seed_gives_the_same_losses(tiny_qwen3, trained, files):
    again = sft([files / "expansions.jsonl"], sft_config(tiny_qwen3), workdir=Workdir(files))
    assert losses(again) == losses(trained)


SCRIPT = """
import sys
from qe_edge.errors import QeEdgeError
from qe_edge.train.config import SftConfig
from qe_edge.train.sft import sft
from qe_edge.work.folder import Workdir
from transformers import TrainerCallback
import qe_edge.train.loop as loop, os, signal
original = loop._callback_class()
class AfterThree(original):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == 3:
            os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        super().on_step_end(args, state, control, **kw)
loop._callback_class = lambda: AfterThree
small = dict(rank=4, alpha=8, epochs=2, batch_size=2, accumulate=1, logging_steps=1, save_steps=2)
small["precision"] = "float32"
config = SftConfig(student=sys.argv[1], **small)
try:
    sft([sys.argv[2]], config, workdir=Workdir())
except QeEdgeError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("signal_name", "code"), [("SIGINT", 130), ("SIGKILL", -signal.SIGKILL)])
def test_interrupted_or_killed_training_goes_on_to_the_same_losses(
    tiny_qwen3, trained, files, signal_name, code
):
    work = Workdir(os.environ["QE_EDGE_WORKDIR"])
    command = [sys.executable, "-c", SCRIPT, str(tiny_qwen3), str(files / "expansions.jsonl"), signal_name]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == code, stopped.stderr
    if signal_name == "SIGINT":
        assert "interrupted at step 3 of 8" in stopped.stdout
    assert not (work.root / "sft" / "001").exists()
    assert not list((work.root / "sft" / "001.partial").rglob("README.md"))  # TRL's, of "[None]", and PEFT's

    other = sft([files / "expansions.jsonl"], sft_config(tiny_qwen3, seed=9, max_steps=1), workdir=work)
    assert other == work.root / "sft" / "002"  # what was interrupted stays
    record = read_record(other)
    assert 0 < record["rows_seen"] < record["rows"]  # by its one step, and so says its card
    assert f"on {record['rows_seen']} expansions" in (other / "README.md").read_text()
    resumed = sft([files / "expansions.jsonl"], sft_config(tiny_qwen3), workdir=work)
    assert resumed == work.root / "sft" / "003"
    assert not (work.root / "sft" / "001.partial").exists()
    assert losses(resumed) == pytest.approx(losses(trained), abs=1e-5)
    assert (read_record(resumed)["rows_seen"], read_record(resumed)["learnt"]) == (
        read_record(resumed)["rows"],
        ["tiny"],
    )


def test_a_training_that_logs_rarely_has_a_loss_though_it_was_interrupted(tiny_qwen3, files):
    work = Workdir(os.environ["QE_EDGE_WORKDIR"])
    script = SCRIPT.replace("logging_steps=1", "logging_steps=50")
    command = [sys.executable, "-c", script, str(tiny_qwen3), str(files / "expansions.jsonl"), "SIGINT"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 130
    resumed = sft([files / "expansions.jsonl"], sft_config(tiny_qwen3, logging_steps=50), workdir=work)
    assert resumed == work.root / "sft" / "001"
    assert [entry["step"] for entry in log_of(resumed) if "loss" in entry] == [3, 8]
    assert read_record(resumed)["metrics"]["train_loss"] > 0


def test_a_half_written_checkpoint_is_passed_over(tiny_qwen3, trained, files):
    work = Workdir(os.environ["QE_EDGE_WORKDIR"])
    command = [sys.executable, "-c", SCRIPT, str(tiny_qwen3), str(files / "expansions.jsonl"), "SIGKILL"]
    subprocess.run(command, capture_output=True, check=False)
    (work.root / "sft" / "001.partial" / "checkpoint-4").mkdir()
    resumed = sft([files / "expansions.jsonl"], sft_config(tiny_qwen3), workdir=work)
    assert losses(resumed) == pytest.approx(losses(trained), abs=1e-5)


def test_blank_queries_are_dropped_and_counted(tiny_qwen3):
    blank = Expansion("t", "q", " ", "en", "m", "zero-shot", "text")
    encoded, dropped = encode_rows([*rows(1), blank], read_spec(tiny_qwen3), byte_ids, 5000)
    assert (len(encoded), dropped) == (1, {"empty": 1})


def test_a_model_that_does_not_speak_chatml_is_refused(tiny_qwen3, files):
    import shutil

    student = files / "student"
    shutil.copytree(tiny_qwen3, student)
    (student / "qe_edge.json").unlink()
    (student / "chat_template.jinja").write_text("[INST] {{ messages[0].content }} [/INST]")
    with pytest.raises(BadArgument, match="ChatML"):
        sft([files / "expansions.jsonl"], sft_config(student), workdir=Workdir(files))


def test_dpo_of_what_was_not_trained_is_refused(tiny_qwen3, files):
    with pytest.raises(BadInput, match="is no folder of `qe-edge train`"):
        dpo(files / "pairs.jsonl", tiny_qwen3, DPO, workdir=Workdir(files))


def test_the_default_prompt_is_fitted_to_the_students_template(tiny_qwen3, tiny_llama):
    assert read_spec(tiny_qwen3).prompt.answer_prefix == "<think>\n\n</think>\n\n"
    assert read_spec(tiny_llama).prompt.answer_prefix == ""
    assert prompt_for("<|im_start|>").answer_prefix == ""
