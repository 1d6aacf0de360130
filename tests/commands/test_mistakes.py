"""What users write wrongly, from outside: each mistake is one line with its code and its remedy."""

import json
import shutil
from pathlib import Path

import pytest
from typer.main import get_command

from qe_edge.cli import app
from qe_edge.errors import BadArgument
from qe_edge.records import Expansion, Pair, encode_jsonl
from qe_edge.retrieval.datasets import builtin_folder


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data", "info", "nothing"], 4, "no data set 'nothing'"),
        (["expand", "tides", "--model", "nothing.gguf"], 4, "no model 'nothing.gguf'"),
        (["expand", "tides"], 4, "run it first, or name a model, such as --model builtin:smollm2-135m"),
        (["train", "dpo", "--adapter", "nothing"], 4, "nothing: no such folder of `qe-edge train`"),
        (["expand", "-", "tides"], 2, "- reads queries from stdin and stands alone: leave the others out"),
        (["search", "-", "--plain"], 2, "- is no query, and stdin is read by `qe-edge expand` alone"),
        (["search", "tides", "-d", "demo-en", "-m", "smollm2-135m"], 4, "did you mean builtin:smollm2-135m?"),
        (["search", "tides", "--model", "none"], 2, "no model 'none'; --plain searches without a model"),
        (["expand", "潮汐"], 4, "run it first, or name a model that knows zh with --model"),
        (["verify"], 4, "run it first, or name a GGUF or an MLX folder: qe-edge verify EXPORTED"),
        (["push", "me/mine"], 4, "run it first, or name its folder: qe-edge push OWNER/NAME FOLDER"),
        (["merge"], 4, "run one of them first, or name what one of them wrote: qe-edge merge ADAPTER"),
        (
            ["export", "--q4"],
            4,
            "or `qe-edge merge`; run one of them first, or name a merged model: qe-edge ex",
        ),
        (["train", "dpo"], 4, "run it first, or name a file with --pairs"),
        (["bench", "--dataset", "nothing"], 4, "no data set 'nothing'"),
        (["bench", "-d", "demo-en", "-m", "builtin:smollm2-135m", "--columns", "x"], 2, "no column 'x'"),
        (["report"], 4, "`qe-edge bench`; run it first, or name a result: qe-edge report RESULTS"),
        (["run", "nothing"], 4, "no recipe nothing"),
        (["pairs", "-d", "demo-en@train", "-e", "nothing.jsonl"], 4, "nothing.jsonl: no such file"),
        (["pairs", "-d", "demo-en@train", "-e", __file__], 5, f"{__file__}:1: not a valid expansion"),
        (["pairs", "-d", "demo-en@train", "-e", __file__, "--join", "lots"], 2, "can't read the join"),
    ],
)
def test_a_users_mistake_is_one_line_and_its_code(qe_edge, arguments, code, message):
    found, out, err = qe_edge(*arguments)
    assert found == code
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err


def test_words_without_quotes_are_told_to_be_queries_of_their_own(qe_edge, gguf):
    told = "each word is a query of its own; one of several words stands in quotes\n"
    assert told in qe_edge("expand", "what", "causes", "tides", "--model", gguf)[2]
    for queries in (["what causes tides"], ["what causes tides", "tides"], ["潮汐", "月亮"], ["tides"]):
        assert told not in qe_edge("expand", *queries, "--model", gguf)[2]


def test_what_python_finds_wrong_is_told_by_the_flags_name(qe_edge, gguf):
    code, _, err = qe_edge("expand", "tides", "--model", gguf, "--budget-tokens", "999999")
    assert code == 2 and err.startswith("error: --budget-tokens must be from 1 to ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "sft", "-e", "x", "--epochs", "-1"], "--epochs: expected a number"),
        (["train", "sft", "-e", "x", "--rank", "0"], "'--rank': this must be at least 1"),
        (["serve", "--port", "99999"], "'--port': this must be at most 65535"),
        (["train", "sft", "--epochs", "x"], "'--epochs': this must be a number"),
        (["train", "sft", "-e", "x", "--mode", "nonsense"], "--mode: unknown nonsense"),
        (["train", "dpo", "--pairs", "x", "--adapter", "x", "--beta", "0"], "--beta: expected"),
        (["train", "dpo", "--pairs", "x", "--adapter", "x", "--loss", "dpo"], "--loss: unknown"),
        (
            ["train", "dpo", "--pairs", "x", "--adapter", "x", "--loss-weight", "1", "--loss-weight", "2"],
            "as many weights",
        ),
        (["pairs", "-d", "demo-en", "-e", "x", "--min-gap", "0"], "--min-gap: expected"),
        (["pairs", "-d", "demo-en", "-e", "x", "--min-gap", "nan"], "--min-gap"),
        (["pairs", "-d", "demo-en", "-e", "x", "--max-per-query", "-1"], "--max-per-query"),
        (["bench", "-d", "demo-en", "-m", "builtin:smollm2-135m", "--threads", "0"], "--threads"),
        (["bench", "-d", "demo-en", "-m", "builtin:smollm2-135m", "--budget-tokens", "0"], "--budget-tokens"),
        (["search", "x", "--plain", "--analyzer", "german"], "no analyzer named 'german'"),
    ],
)
def test_values_out_of_bounds_are_named(qe_edge, arguments, message):
    code, _, err = qe_edge(*arguments)
    assert code == 2
    assert message in err


def test_an_error_with_json_is_an_object_too(qe_edge):
    code, out, _ = qe_edge("data", "info", "nothing", "--json")
    assert code == 4
    envelope = json.loads(out)
    assert (envelope["status"], envelope["command"], envelope["warnings"]) == ("error", "data info", [])
    assert envelope["errors"][0].startswith("no data set 'nothing'")


def test_what_would_be_ignored_is_refused(qe_edge):
    code, _, err = qe_edge("bench", "-d", "demo-en", "--refine")
    assert code == 2 and "--feedback and --refine need a model: name one with --model" in err
    code, _, err = qe_edge("export", "nowhere", "--mlx-bits", "7")
    assert code == 2 and "MLX can't quantize to 7 bits" in err
    code, _, err = qe_edge("push", "student", "folder")
    assert code == 2 and "'student' is no repository; write OWNER/NAME" in err


def test_a_reader_that_is_not_there_is_told_before_the_work(qe_edge, gguf):
    for command in (["bench", "-d", "demo-en"], ["search", "tides"], ["serve", "--port", "0"]):
        refine = [] if command[0] == "serve" else ["--refine"]
        code, out, err = qe_edge(*command, "-m", gguf, *refine, "--reader", "nothere.gguf")
        assert (code, out) == (4, "")
        assert err.splitlines()[-1] == (
            "error: nothere.gguf: no such file; give an encoder's .gguf, or one of the hub "
            "(hf:OWNER/NAME:Q8_0)"
        )
    assert not Path("qe-edge-work/bench").exists()


def test_a_file_of_another_kind_is_told_before_the_work(qe_edge, gguf, tmp_path):
    table, empty = tmp_path / "x.csv", tmp_path / "best.jsonl"
    table.write_text("machine,tokens\n")
    empty.touch()
    for asked, told in (
        (
            ["search", "tides", "-m", gguf, "--refine", "--reader", table],
            f"{table}: not a GGUF file; give a .gguf",
        ),
        (
            ["bench", "-d", "demo-en", "-m", gguf, "--refine", "--reader", table],
            f"{table}: not a GGUF file; give",
        ),
        (
            ["bench", "-d", "demo-en", "--baseline", f"dense:{table}"],
            f"{table}: neither a .gguf file (here, or",
        ),
        (["train", "dpo", "--pairs", empty], f"{empty}: holds no pair; `qe-edge pairs` writes pairs.jsonl"),
    ):
        code, out, err = qe_edge(*asked)
        assert code and not out and err.splitlines()[-1].startswith(f"error: {told}")
    assert not Path("qe-edge-work/bench").exists()


def test_a_data_set_that_is_mistyped_or_out_of_place_has_its_remedy(qe_edge, tmp_path):
    (tmp_path / "scifacts").mkdir()
    code, _, err = qe_edge("data", "info", f"{tmp_path}/scifact")
    assert code == 4 and err.endswith(f"ir_datasets id. Did you mean {tmp_path / 'scifacts'}?\n")
    made = Path("qe-edge-work", "data", "notes")  # as `data make` leaves one
    made.mkdir(parents=True)
    (made / "corpus.jsonl").touch()
    code, _, err = qe_edge("bench", "-d", "notes@test")
    assert code == 4 and err.endswith(f" such as beir/nfcorpus/test. Did you mean {made}?\n")
    shutil.copytree(builtin_folder("demo-en"), tmp_path / "mine")
    code, _, err = qe_edge("data", "info", tmp_path / "mine" / "corpus.jsonl")
    assert code == 4 and err.endswith(f"ir_datasets id; its folder is {tmp_path / 'mine'}\n")
    code, _, err = qe_edge("data", "info", "/nope")
    assert code == 4 and err.endswith("ir_datasets id; `qe-edge data list` lists those that are known\n")
    code, _, err = qe_edge("bench", "demo-en")
    assert code == 2 and "A data set is named with --dataset." in err
    code, _, err = qe_edge("teach", "-d", "demo-en@train")
    assert (code, err) == (2, "error: name the teacher's model with --model\n")


def test_a_usage_error_says_what_to_write_instead(qe_edge):
    for asked, told in (
        (
            ["teach", "--split", "train"],
            "No such option: --split. A split is named with its data set: NAME@SPLIT",
        ),
        (["--json", "doctor"], "Options come after one of the commands"),
        (["--json", "search"], "Options come after one of the commands"),
        (["search", "tap", "water"], "A query of several words stands in quotes"),
        (["train", "foo"], "No such command 'foo'. There are: sft, dpo."),
        (["prune"], "Missing argument 'model'. A merged model folder, or a base model to be trained."),
        (["doctor", "now"], "(now). It takes options only\n"),
        (["bench", "--limit", "4"], "--limit. --max-queries takes some of the queries only\n"),
        (["teach", "--max-queries", "4"], "--max-queries. Ctrl-C, --max-tokens-total and --max-cost end it"),
        (["search", "tides", "--k", "3"], "No such option: --k (Possible options: -k)\n"),
        (["search", "tides", "--top-k", "3"], "--top-k. -k says how many results to show\n"),
        (["report", "--format", "pdf"], "--format. It writes HTML; --markdown, --latex, --csv and --png are"),
        (["export", "--refine"], "No such option: --refine\n"),  # --recipe is like it only by its dashes
        (["merge", "--adapter", "x"], "Name it without an option: qe-edge merge ADAPTER\n"),
        (["train", "--json"], "Options come after one of the commands: sft, dpo\n"),
        (["serve", "--dataset", "x"], "No such option: --dataset. What it works on is named with --index\n"),
        (["train", "sft", "--dataset", "x"], "--dataset. What it works on is named with --expansions\n"),
        (["export", "--dataset", "x"], "is named without an option: qe-edge export MODEL\n"),
        (["train", "dpo", "--dataset", "x"], "--dataset. What it works on is named with --pairs\n"),
        (["teach", "aero"], "(aero). What it works on is named with --dataset\n"),
        (["train", "sft", "a.jsonl"], "(a.jsonl). What it works on is named with --expansions\n"),
        (["pairs", "aero"], "(aero). What it works on is named with --dataset and --expansions\n"),
        *(
            ([verb, "tap", "--threads", "1"], "--threads. It takes the cores that are free; `serve` and")
            for verb in ("expand", "search")
        ),
        (["bench", "--datset", "x"], "No such option: --datset (Possible options: --dataset)\n"),
        (["serve", "--json"], "No such option: --json\n"),
        (["run", "demo", "--print-config"], "No such option: --print-config. --show prints the recipe\n"),
        (
            ["expand", "--deadline-ms", "9", "tap"],
            "--deadline-ms. `serve` and Python's expand take a deadline\n",
        ),
        (["export", "--q5"], "--q5. --quant takes other kinds, such as Q5_K_M or Q6_K\n"),
        (
            ["expand", "tap", "--budget", "9"],
            "No such option: --budget (Possible options: --budget-tokens)\n",
        ),
        (["bench", "--max", "9"], "No such option: --max (Possible options: --max-queries)\n"),
        (["pairs", "--min-gapp", "1"], "No such option: --min-gapp (Possible options: --min-gap)\n"),
    ):
        code, _, err = qe_edge(*asked)
        assert code == 2 and told in err and "--terms" not in err


def test_what_a_command_advises_is_a_setting_of_a_recipe(qe_edge, monkeypatch):
    for advice, settings_of in (
        ("no GPU; train with --device cpu", ("run", "demo")),
        ("no test data: name some with --test", ("demo",)),
        ("no room; choose another --workdir", ()),
        ("none is there: `qe-edge teach --n 4` asks", ()),
    ):

        def fails(*_, advice=advice, **__):
            raise BadArgument(advice)

        monkeypatch.setattr("qe_edge.pipeline.run_recipe", fails)
        for command in (["run", "demo"], ["demo"]):
            where = " (in a recipe, options are settings: `qe-edge run demo --show` prints them)"
            there = f"{advice}{where if command[0] in settings_of else ''}"
            assert qe_edge(*command) == (2, "", f"error: {there}\n")


def test_files_without_an_expansion_are_named(qe_edge, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    told = f"error: {empty}: no expansion is there; `qe-edge teach` asks for them\n"
    assert qe_edge("pairs", "-d", "demo-en@train", "-e", empty) == (5, "", told)
    pytest.importorskip("trl")
    code, _, err = qe_edge("train", "sft", "-e", empty)
    assert code == 5 and err.endswith(told)


def test_a_long_query_is_told_by_its_beginning(qe_edge, gguf):
    _, _, err = qe_edge("expand", "wave " * 9000, "-m", gguf)
    told = "is to be searched as it is: the query has 9000 words, over 256"
    assert err.startswith(f"'{'wave ' * 11}wave…' {told}\n")


def test_a_folder_of_results_is_led_to_the_last_one(qe_edge, tmp_path):
    work = tmp_path / "work"
    assert qe_edge("bench", "-d", "demo-en", "--model", "none", "--workdir", work)[0] == 0
    for named in (work, work / "bench"):
        code, _, err = qe_edge("report", named)
        assert code == 4 and err.endswith(f"writes one; the last one there is {work / 'bench' / '001'}\n")
    code, _, err = qe_edge("report", tmp_path / "nothing")
    assert code == 4 and err.endswith("`qe-edge bench` writes one\n")


def test_a_file_that_another_command_takes_is_led_there(qe_edge, tmp_path):
    texts, pairs = tmp_path / "texts.jsonl", tmp_path / "pairs.jsonl"
    asked = ("demo-en", "1", "tides", "en")
    texts.write_bytes(encode_jsonl([Expansion(*asked, "big", "zero-shot", "the moon")]))
    values = (0.9, 0.1, 0.9, 0.1, "big", "zero-shot", "big", "few-shot")
    pairs.write_bytes(encode_jsonl([Pair(*asked, "the moon", "a cat", *values)]))
    for asked, file, taker in (
        (["pairs", "-d", "demo-en@train", "-e", pairs], pairs, "`qe-edge train dpo --pairs`"),
        (["train", "dpo", "--pairs", texts], texts, "`qe-edge train sft --expansions`"),
    ):
        code, _, err = qe_edge(*asked)
        assert code == 5 and f"{file}:1: not a valid " in err and err.endswith(f": it is for {taker}\n")


def every_command(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        yield from every_command(command, (*path, name)) if hasattr(command, "commands") else ()


def test_every_command_bears_every_usage_error(qe_edge):
    for path, command in every_command(get_command(app)):
        options = [param for param in command.params if param.param_type_name == "option"]
        valued = [param.opts[0] for param in options if not param.is_flag]
        as_json = ["--json"] if any("--json" in param.opts for param in options) else []
        for words in (["--nope"], ["--nope", "x", "y"], ["-9 x"], *([option] for option in valued)):
            code, out, err = qe_edge(*path, *as_json, *words)
            assert (code, err.count("Error: ")) == (2, 1), (path, words)
            assert not as_json or json.loads(out)["command"] == " ".join(path)


def test_what_was_trained_is_listed_and_a_file_is_no_query(qe_edge, tmp_path):
    (tmp_path / "sft" / "001").mkdir(parents=True)
    code, _, err = qe_edge("merge", tmp_path / "sft" / "999")
    assert code == 4 and err.endswith(f"no such folder of `qe-edge train`; there are: {tmp_path}/sft/001\n")
    file = tmp_path / "my queries.txt"
    file.touch()
    _, _, err = qe_edge("expand", file, "-m", tmp_path / "nothing.gguf")
    told = f"warning: {file} is taken for a query; `qe-edge expand - < '{file}'` reads queries from it\n"
    assert err.startswith(told)


def test_a_query_like_a_flag_has_its_remedy(qe_edge):
    code, _, err = qe_edge("search", "--leave days")
    assert code == 2 and "A query that begins with - comes last, after --" in err
    for command in ("expand", "search"):
        code, _, err = qe_edge(command, "-5 degrees")
        assert code == 2 and "A query that begins with - comes last, after --, as in: -- '-5 degrees'" in err
        code, _, err = qe_edge(command, "tides", "--threads", "1")
        assert code == 2 and "after --" not in err
    code, _, err = qe_edge("search", "--", "-5 degrees", "--dataset", "demo-en")
    assert code == 2 and "Options stand before the --, which only a query comes after" in err


@pytest.mark.parametrize(
    ("arguments", "command", "message"),
    [
        (["train", "sft", "--rank", "x"], "train sft", "for '--rank': this must be a whole number"),
        (["expand", "--nonsense"], "expand", "No such option: --nonsense"),
        (["nothing"], "qe-edge", "No such command 'nothing'"),
        ([], "qe-edge", "No such option: --json"),
        (["bench"], "bench", "name at least one data set"),
    ],
)
def test_a_usage_error_with_json_is_an_object_too(qe_edge, arguments, command, message):
    code, out, err = qe_edge(*arguments, "--json")
    envelope = json.loads(out)
    assert (code, envelope["command"]) == (2, command)
    assert message in envelope["errors"][0] and err


@pytest.mark.parametrize("arguments", [["--nonsense"], ["bench"], ["search"]])
def test_usage_errors_exit_with_2(qe_edge, arguments):
    assert qe_edge(*arguments)[0] == 2
