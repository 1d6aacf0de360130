"""The command line from outside: exit codes, stdout and stderr, defaults taken from the work folder."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import msgspec
import pytest
from filelock import FileLock, Timeout
from results import bench

from qe_edge import __version__, console, doctor
from qe_edge.cli import app, main
from qe_edge.commands.common import command_line
from qe_edge.errors import QeEdgeError, explained, require
from qe_edge.records import Expansion, Pair, encode_jsonl, read_jsonl
from qe_edge.retrieval.datasets import builtin_folder, load_dataset
from qe_edge.student.spec import read_spec, write_spec
from qe_edge.work.files import atomic_path, write_bytes, write_json
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import RunFolder, check_output


def test_doctor_names_machine_and_extras(qe_edge):
    code, out, _ = qe_edge("doctor")
    assert code == 0
    assert "cores" in out
    assert "train      train students: ok" in out


@pytest.mark.parametrize("amx", [None, "agrees", "differs", "dies"])
def test_doctor_keeps_to_80_columns(amx):
    found = doctor.look(Path())
    found["machine"]["amx"] = amx
    lines = doctor.describe(found).splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert any(line.startswith("AMX") for line in lines) == (amx is not None)
    assert any("--no-binary llama-cpp-python" in line for line in lines) == (amx == "dies")


def test_json_is_exactly_one_object(qe_edge):
    code, out, _ = qe_edge("data", "info", "demo-en", "--json")
    envelope = json.loads(out)
    assert code == 0
    assert list(envelope) == [
        "schema_version",
        "command",
        "status",
        "inputs",
        "artifacts",
        "metrics",
        "warnings",
        "errors",
    ]
    assert envelope["metrics"]["queries"] == 26


def test_pairs_are_not_taken_to_a_student_of_other_data(qe_edge, tiny_qwen3, tmp_path):
    folder = tmp_path / "sft" / "001"
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"command": "train sft", "base": "base", "learnt": ["a"]})
    write_spec(folder, read_spec(tiny_qwen3))
    pair = Pair("b", "1", "q", "en", "moon", "bread", 1, 0, 1, 0, *["m", "zero-shot"] * 2)
    (tmp_path / "pairs.jsonl").write_bytes(encode_jsonl([pair]))
    code, _, err = qe_edge("train", "dpo", "--pairs", tmp_path / "pairs.jsonl", "--workdir", tmp_path)
    assert code == 2
    assert (
        "learnt from a, and the pairs are of b; make pairs of what it learnt from (`qe-edge pairs`), or, if b"
        in err
    )
    kept = tmp_path / "pairs" / "001"
    kept.mkdir(parents=True)
    (kept / "pairs.jsonl").write_bytes(encode_jsonl([pair]))
    write_json(kept / "run.json", {"command": "pairs", "settings": {"dataset": "b@train"}})
    code, _, err = qe_edge("train", "dpo", "--adapter", folder, "--workdir", tmp_path)
    assert code == 2 and "learnt from a, and the pairs are of b" in err
    assert err.startswith(f"pairs: {kept / 'pairs.jsonl'} (the newest, of b@train; name another to use that)")
    code, _, err = qe_edge("train", "dpo", "--pairs", tmp_path / "none.jsonl", "--workdir", tmp_path)
    assert code == 4 and "none.jsonl: no such file" in err


def test_queries_that_bm25_finds_nothing_for_are_told(qe_edge, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(builtin_folder("demo-en"), mine)
    with (mine / "queries.jsonl").open("a") as queries, (mine / "qrels" / "test.tsv").open("a") as qrels:
        queries.write('{"_id": "none", "text": "to be or not to be"}\n')  # stop words alone
        qrels.write(f"none\t{next(load_dataset('demo-en').documents())[0]}\t1\n")
    code, out, _ = qe_edge("bench", "-d", mine, "--analyzer", "english", "--json", "--workdir", tmp_path)
    told = "BM25 finds nothing at all for 1 query of mine@test: does --analyzer english fit them?"
    assert code == 0 and any(told in warning for warning in json.loads(out)["warnings"])


def test_a_folder_that_lacks_its_queries_is_told(qe_edge, tmp_path):
    shutil.copytree(builtin_folder("demo-en"), tmp_path / "mine")
    (tmp_path / "mine" / "queries.jsonl").unlink()
    code, out, err = qe_edge("data", "info", tmp_path / "mine")
    assert (code, out) == (4, "") and "mine has no queries.jsonl" in err
    shutil.rmtree(tmp_path / "mine" / "qrels")
    code, out, _ = qe_edge("data", "info", tmp_path / "mine")
    assert out.splitlines()[-1].startswith(f"next:   qe-edge data queries {tmp_path / 'mine'} --endpoint")


def test_ctrl_c_while_the_commands_are_imported(tmp_path):
    script = """
import signal, sys
import qe_edge.__main__ as start
class Sender:
    def find_spec(self, name, *_):
        if name == "qe_edge.cli":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Sender())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["qe-edge", "data", "list", "--json"]
start.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    found = json.loads(ended.stdout)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted\n")
    assert (found["command"], found["status"], found["errors"]) == ("data list", "partial", ["interrupted"])


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("teach", "; the same command goes on"),
        ("data judge", "; the same command goes on"),
        ("bench", "; the same command goes on with what was written"),
        ("merge", "; no half-written file is left: give the same command again"),
        ("search", ""),
    ],
)
def test_an_early_ctrl_c_says_what_the_same_command_does(monkeypatch, capsys, command, told):
    monkeypatch.setattr(sys, "argv", ["qe-edge", *command.split()])
    with pytest.raises(SystemExit) as ended:
        main(interrupted=True)
    assert (ended.value.code, capsys.readouterr().err) == (130, f"error: interrupted{told}\n")


def test_the_newest_is_named_with_what_it_learnt_from(qe_edge, tmp_path):
    folder = tmp_path / "merge" / "001"
    folder.mkdir(parents=True)
    for record, learnt in (({}, ""), ({"learnt": ["a", "b@dev"]}, ", which learnt from a + b@dev")):
        write_json(folder / "run.json", {"command": "merge", **record})
        code, _, err = qe_edge("export", "--workdir", tmp_path)
        assert code == 5 and f"model: {folder} (the newest{learnt}; name another to use that)" in err


def test_what_is_warned_of_is_in_the_object_too(qe_edge, tmp_path):
    data = load_dataset("demo-en@train")
    (tmp_path / "made.tsv").write_text("".join(f"{id}\tsome words about it\n" for id in data.queries))
    asked = ["--import", tmp_path / "made.tsv", "--format", "querygym", "-m", "big", "--mode", "few-shot"]
    found = []
    for name in ("demo-en@train", "demo-en"):
        code, out, err = qe_edge("teach", "-d", name, *asked, "--out", tmp_path / name, "--json")
        found.append((code, json.loads(out)["warnings"]))
        assert all(warning in err for warning in found[-1][1])
    assert found[0] == (0, []) and found[1][0] == 5  # no row is of the test queries
    assert found[1][1] == ["demo-en: its test queries; demo-en@train has those to train on"]
    rows = read_jsonl(tmp_path / "demo-en@train" / "expansions.jsonl", Expansion)
    assert {(row.model, row.mode) for row in rows} == {("big", "few-shot")}


def test_every_help_fits_a_screen(qe_edge, monkeypatch):
    import typer

    monkeypatch.setenv("COLUMNS", "80")
    commands = {(name,): found for name, found in typer.main.get_command(app).commands.items()}
    commands |= {
        (*names, name): one
        for names, found in list(commands.items())
        for name, one in getattr(found, "commands", {}).items()
    }
    assert len(commands) > 18
    for names, command in [((), typer.main.get_command(app)), *commands.items()]:
        _, out, _ = qe_edge(*names, "--help")
        lines = out.splitlines()
        assert len(lines) <= 60 and max(map(len, lines)) <= 80, names
        assert not [line for line in lines if line.endswith("...") and "Usage" not in line], (
            names
        )  # a sentence cut off
        for parameter in command.params:
            assert parameter.help, (names, parameter.name)
            if not parameter.hidden and parameter.param_type_name == "option":
                assert max(parameter.opts, key=len) in out


def test_help_all_shows_what_is_rarely_used(qe_edge):
    assert "--logging-steps" not in qe_edge("train", "sft", "--help")[1]
    code, out, _ = qe_edge("train", "sft", "--help-all")
    assert code == 0 and "--logging-steps" in out and "--rank" in out


def test_version(qe_edge):
    assert qe_edge("--version") == (0, f"{__version__}\n", "")


def test_bench_without_a_model_measures_bm25_and_the_teacher(qe_edge):
    code, out, err = qe_edge("bench", "-d", "demo-en")
    assert code == 0
    assert "demo-en@test" in out
    assert "bench: without a model; --model takes one" in err
    export = Path(os.environ["QE_EDGE_WORKDIR"]) / "export" / "001"
    export.mkdir(parents=True)
    (export / "student.gguf").touch()
    assert "bench: without a model" in qe_edge("bench", "-d", "demo-en", "--model", "none")[2]
    code, _, err = qe_edge("bench", "-d", "demo-en", "--measure", "nDCG@@")
    assert code == 2 and "without a model" not in err


def test_a_bare_name_is_told_to_mean_the_test_queries(qe_edge, capsys):
    from qe_edge.commands.common import tell_split

    for name in ("demo-en@train", "demo-en@test", "demo-en"):
        tell_split(name, load_dataset(name))
    assert capsys.readouterr().err == (
        "warning: demo-en: its test queries; demo-en@train has those to train on\n"
    )


def test_search_without_expansion(qe_edge):
    code, out, err = qe_edge("search", "popcorn", "--plain", "-k", "2")
    assert code == 0
    assert out.startswith(" 1. en-")
    following = "next:   qe-edge search --dataset demo-en --model builtin:smollm2-135m popcorn\n"
    assert err == f"data set: demo-en (the default; name another to use that)\n{following}"
    assert qe_edge("search", "popcorn", "--plain", "-k", "2", "-d", "demo-en") == (0, out, following)
    code, _, err = qe_edge("search", "popcorn", "--plain", "--model", "x.gguf")
    assert (code, err) == (2, "error: --plain searches without a model: leave --model out\n")
    for blank in ("", "  "):
        code, _, err = qe_edge("search", blank, "--plain")
        assert (code, err) == (5, "error: the query is empty; give at least one word\n")
    code, _, err = qe_edge("search", "popcorn", "--plain", "--passages", "3")
    assert code == 2 and "give --feedback or --refine too" in err
    code, _, err = qe_edge("search", "popcorn", "--refine", "--feedback")
    assert code == 2 and "give one of --plain, --feedback and --refine" in err
    code, _, err = qe_edge("bench", "-d", "demo-en", "--passages", "3")
    assert code == 2 and "passages are read with feedback or refine only" in err


def test_a_report_without_times_writes_its_csv_and_says_what_to_leave_out(qe_edge, tmp_path):
    pytest.importorskip("altair")
    made = bench()
    write_json(
        tmp_path / "result.json",
        msgspec.to_builtins(msgspec.structs.replace(made, datasets=made.datasets[1:])),
    )
    flags = ["--png", tmp_path / "a.png", "--csv", tmp_path / "a.csv"]
    code, _, err = qe_edge("report", tmp_path / "result.json", *flags)
    assert code == 5 and err.endswith("nothing to draw; name another one first, or leave --png out\n")
    assert (tmp_path / "a.csv").read_text().startswith("machine,dataset,")


@pytest.mark.parametrize("option", ["--out", "--csv", "--png"])
def test_no_report_takes_the_place_of_a_folder(qe_edge, tmp_path, option):
    result, mine = tmp_path / "bench" / "result.json", tmp_path / "mine"
    for folder in (result.parent, mine):
        folder.mkdir()
    write_json(result, msgspec.to_builtins(bench()))
    (mine / "precious.txt").touch()
    for folder in (mine, result.parent):
        code, out, err = qe_edge("report", result.parent, option, folder)
        assert (code, out, err) == (2, "", f"error: {option} {folder}: a folder; name a file in it\n")
    assert (mine / "precious.txt").exists()
    assert list(result.parent.iterdir()) == [result]  # no other file was written either


def test_no_report_takes_the_place_of_its_own_result(qe_edge, tmp_path):
    result, record = tmp_path / "result.json", tmp_path / "run.json"
    write_json(result, msgspec.to_builtins(bench()))
    record.write_text("{}")
    before = result.read_bytes()
    for named in (tmp_path, result):
        for file in (result, record):
            code, _, err = qe_edge("report", named, "--csv", file)
            assert (code, err) == (2, f"error: {file} is what the report is made of; name another file\n")
    code, _, err = qe_edge("report", result, "--csv", tmp_path / "report.html")
    assert (code, err) == (2, "error: give --out, --csv and --png a file each\n")
    assert (result.read_bytes(), record.read_text(), len(list(tmp_path.iterdir()))) == (before, "{}", 2)


def test_report_draws_the_newest_bench_and_prints_markdown(qe_edge, tmp_path):
    pytest.importorskip("altair")
    folder = Workdir().new("bench")
    write_json(folder / "result.json", msgspec.to_builtins(bench("laptop")))
    code, out, err = qe_edge("report", "--png", tmp_path / "chart.png", "--markdown")
    written = f"written, too: {folder / 'report.html'}, {tmp_path / 'chart.png'}\n"
    opened = f"next:   {command_line(('python', '-m', 'webbrowser', folder / 'report.html'))}\n"
    took = f"result: {folder} (the newest, on demo-en@test + demo-zh@test; name another to use that)\n"
    assert (code, err) == (0, took + written + opened)
    assert out.startswith("### demo-en@test\n\n| system | join | nDCG@10 |")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_progress_shows_count_rate_and_time_left_on_a_terminal_alone():
    pty = pytest.importorskip("pty")
    code = (
        "import time\nfrom qe_edge.console import progress\n"
        "with progress('working', 4) as advance:\n"
        "    for _ in range(4):\n        time.sleep(0.3)\n        advance(info='a note')\n"
    )
    terminal, end = pty.openpty()
    termios = pytest.importorskip("termios")
    termios.tcsetwinsize(end, (24, 120))
    subprocess.run([sys.executable, "-c", code], stderr=end, check=True)
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    for part in ("working", "4/4", "it/s", "[00:0", "a note"):
        assert part in shown
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_a_silent_command_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 0.01)
    with console.still_at_work("merge"):
        told = ""
        with console.progress("working", None):  # which speaks for itself
            time.sleep(0.1)
            capsys.readouterr()
            time.sleep(0.1)
            assert capsys.readouterr().err == ""
        end = time.monotonic() + 60
        while not told and time.monotonic() < end:
            told = capsys.readouterr().err
    assert re.match(r"merge: 00:\d\d so far\n", told)


def test_what_a_process_of_ours_told_was_no_silence(monkeypatch, capsys):
    monkeypatch.setattr(console, "SILENCE", 1)
    with console.still_at_work("bench"):
        with console.speaking():
            time.sleep(1.5)
        time.sleep(0.5)
    assert capsys.readouterr().err == ""


def test_a_file_is_no_work_folder(qe_edge, tmp_path):
    (tmp_path / "notes.txt").touch()
    for place in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "work"):
        for command in (["doctor"], ["demo"], ["search", "popcorn", "--plain"]):
            code, out, err = qe_edge(*command, "--workdir", place)
            told = f"error: --workdir {place}: {tmp_path / 'notes.txt'} is a file; name a folder\n"
            assert (code, out, err) == (2, "", told)
    gone = FileNotFoundError(2, "No such file or directory", "/proc/foo")
    told = "/proc/foo: No such file or directory; is it there, and may you read and write it?"
    assert explained(gone) == told


def test_output_cut_short_by_a_pipe_is_no_error(tmp_path):
    command = f"{sys.executable} -m qe_edge data list | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("demo-en")
    assert done.stderr == ""


def test_a_missing_extra_is_one_line_with_the_pip_command():
    with pytest.raises(QeEdgeError, match=r"pip install 'qe-edge\[mlx\]'") as error:
        require("not_a_module_at_all", "mlx")
    assert error.value.exit_code == 3


# Outputs


def test_a_full_disk_leaves_the_old_output(tmp_path):
    target = tmp_path / "out.json"
    write_bytes(target, b"old")
    with (
        pytest.raises(QeEdgeError, match="No space left on device; nothing was changed"),
        atomic_path(target) as path,
    ):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_folder_replaces_a_folder_only_when_it_is_whole(tmp_path):
    target = tmp_path / "out"
    for content in ("one", "two"):
        with atomic_path(target) as path:
            path.mkdir()
            (path / "file").write_text(content)
    assert (target / "file").read_text() == "two"
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as path:
        path.mkdir()
        raise KeyboardInterrupt
    assert (target / "file").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_output_folder_that_cannot_be_written_is_refused_first(tmp_path, qe_edge):
    (tmp_path / "file").write_text("")
    with pytest.raises(QeEdgeError, match="is a file"):
        check_output(tmp_path / "file" / "out", "pairs")
    expansions = builtin_folder("demo-en") / "expansions" / "train.jsonl"
    for out in (tmp_path / "file" / "out", "/proc/nowhere/out"):
        code, _, err = qe_edge("pairs", "-d", "demo-en@train", "-e", expansions, "--out", out)
        assert (code, err.count("error: ")) in ((2, 1), (6, 1))


def test_numbers_count_up_and_the_newest_is_the_highest(tmp_path):
    work = Workdir(tmp_path)
    assert work.new("sft") == tmp_path / "sft" / "001"
    for number in ("002", "010", "011.partial", "notes"):
        (tmp_path / "sft" / number).mkdir(parents=True)
    (tmp_path / "dpo" / "001").mkdir(parents=True)
    os.utime(tmp_path / "dpo" / "001", (1, 1))
    assert work.newest("dpo", "sft") == tmp_path / "sft" / "010"
    assert work.newest("dpo") == tmp_path / "dpo" / "001"
    assert work.new("sft") == tmp_path / "sft" / "011"


def test_a_numbered_run_makes_way_for_interrupted_work_and_resumes_its_own(tmp_path, capsys):
    work, source = Workdir(tmp_path / "work"), tmp_path / "in.jsonl"
    source.write_text("{}")

    def begin(seed):
        return RunFolder("train sft", {"seed": seed}, {"in": source}, work.new("sft"))

    def leave_work(run):
        (run.partial / "generated" / "x").mkdir(parents=True)
        (run.partial / "generated" / "x" / f"{run.out.name}.jsonl").touch()

    first = begin(1)
    assert begin(1).partial == first.partial
    leave_work(first)
    source.write_text("{} ")
    second = begin(1)
    assert second.out == tmp_path / "work" / "sft" / "002"
    told = capsys.readouterr().err
    assert f"{first.partial} holds an unfinished run with other inputs; it stays there" in told
    for run, free in ((first, True), (second, False)):  # for another process
        lock = FileLock(run.out.with_name(f".{run.out.name}.lock"), timeout=0)
        with nullcontext() if free else pytest.raises(Timeout):
            lock.acquire()
        lock.release()
    leave_work(second)
    assert begin(2).finish() == tmp_path / "work" / "sft" / "003"
    assert first.partial.is_dir() and second.partial.is_dir()
    source.write_text("{}")
    again = begin(1)  # as it was: its work comes to the newest number
    assert again.out == tmp_path / "work" / "sft" / "004"
    assert (again.partial / "generated" / "x" / "001.jsonl").is_file()
    assert not first.partial.exists() and second.partial.is_dir()
    again.finish()
    with FileLock(tmp_path / "work" / "sft" / ".005.lock"):  # as another process has it
        assert work.new("sft").name == "006"
    told = capsys.readouterr().err
    assert f"another command is writing {tmp_path}/work/sft/005; this one takes the next number\n" in told


def test_a_run_folder_is_resumed_by_the_same_run_alone(tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    first = RunFolder("bench", {"models": ("b",)}, {"in": source}, tmp_path / "out")
    RunFolder("bench", {"models": ("a",)}, {"in": source}, tmp_path / "out")  # nothing to lose in the first
    (first.partial / "generated" / "x").mkdir(parents=True)
    (first.partial / "generated" / "x" / "rows.jsonl").touch()
    run = RunFolder("bench", {"models": ("a",)}, {"in": source}, tmp_path / "out")
    source.write_text("{} ")
    with pytest.raises(QeEdgeError, match="unfinished run with other inputs; run it again as it was"):
        RunFolder("bench", {"models": ("a",)}, {"in": source}, tmp_path / "out")
    source.write_text("{}")
    monkeypatch.setattr("qe_edge.work.runs.versions", lambda: {"llama-cpp-python": "9.9"})
    with pytest.raises(QeEdgeError, match="with other settings and versions"):
        RunFolder("bench", {"models": ("b",)}, {"in": source}, tmp_path / "out")
    assert run.finish(rows=3) == tmp_path / "out"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["rows"] == 3
    assert not Path(f"{tmp_path}/out.partial").exists()
