"""Outputs are whole or not at all, at every moment: also while one folder takes another one's place."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from survival import REPLACING, WAYS, is_whole

from qe_edge.errors import BadArgument
from qe_edge.work import files
from qe_edge.work.exchange import exchange
from qe_edge.work.files import atomic_path, recover, write_bytes
from qe_edge.work.folder import Workdir
from qe_edge.work.runs import RunFolder, check_output

NOBODY = 2**22 + 1  # above any process's number


def put(path, text):
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.txt").write_text(text)
    (path / "b.txt").write_text(text)


def state(path):
    return {file.name: file.read_text() for file in path.iterdir()}


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """As this system does it, and as those do that can't exchange two names."""
    if request.param == "by two renames":
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    return request.param


def test_a_folder_takes_the_place_of_another(tmp_path, way):
    out = tmp_path / "out"
    for text in ("one", "two", "three"):
        with atomic_path(out) as partial:
            put(partial, text)
        assert state(out) == {"a.txt": text, "b.txt": text}
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_file_takes_the_place_of_a_folder_or_back(tmp_path, way):
    put(tmp_path / "folder", "mine")
    with pytest.raises(BadArgument, match="folder is a folder, and stays as it is; name a file in it"):
        write_bytes(tmp_path / "folder", b"two")
    assert state(tmp_path / "folder") == {"a.txt": "mine", "b.txt": "mine"}
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(BadArgument, match="file is a file, and stays as it is; name a folder"),
        atomic_path(tmp_path / "file") as partial,
    ):
        put(partial, "three")
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_an_error_leaves_the_old_one(tmp_path, way):
    put(tmp_path / "out", "one")
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "out") as partial:
        put(partial, "two")
        raise KeyboardInterrupt
    assert state(tmp_path / "out") == {"a.txt": "one", "b.txt": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_linux_and_macos_exchange_two_names(tmp_path):
    put(tmp_path / "x", "x")
    put(tmp_path / "y", "y")
    if sys.platform in ("linux", "darwin"):
        assert exchange(tmp_path / "x", tmp_path / "y")
        assert (state(tmp_path / "x")["a.txt"], state(tmp_path / "y")["a.txt"]) == ("y", "x")
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "x", tmp_path / "gone")


def test_what_was_moved_away_by_a_killed_process_is_put_back_at_the_next_look(tmp_path):
    for look in (
        lambda out: check_output(out, "export"),
        lambda out: Workdir(tmp_path).newest("export"),
        lambda out: Workdir(tmp_path).new("export"),
        recover,
    ):
        old = tmp_path / "export" / f".001.{NOBODY}.old"
        put(old, "old")
        (old / "run.json").write_text('{"command": "export"}')
        put(tmp_path / "export" / f".001.{NOBODY}.partial", "half")
        out = tmp_path / "export" / "001"
        look(out)
        assert state(out)["a.txt"] == "old"
        assert [path.name for path in out.parent.iterdir() if "old" in path.name] == []
        recover(out)
        assert [path.name for path in out.parent.iterdir() if path.suffix != ".lock"] == ["001"]
        files.remove(out)


def test_names_that_people_give_are_none_of_our_leftovers(tmp_path):
    theirs = [f".out.v2.{NOBODY}.old", f".out.v2.{NOBODY}.partial", ".out.20241130.old", ".plan.2024.old"]
    stage = tmp_path / "bench"
    for name in theirs:
        put(stage / name, name)
    recover(stage / "out")
    Workdir(tmp_path).new("bench")
    assert sorted(path.name for path in stage.iterdir() if path.suffix != ".lock") == sorted(theirs)


def test_neither_another_commands_work_nor_an_input_is_replaced(tmp_path):
    out = tmp_path / "mine"
    train = RunFolder("train sft", {}, {}, out)
    put(train.partial / "checkpoint-13", "hours")
    with pytest.raises(BadArgument, match="holds an unfinished run with other command;"):
        RunFolder("bench", {}, {}, out)
    assert state(train.partial / "checkpoint-13")["a.txt"] == "hours"
    train.finish()
    put(out / "run", "mine")
    with pytest.raises(BadArgument, match=r"holds an input, .*a\.txt, and would be replaced; choose a new"):
        check_output(out, "train sft", [out / "run" / "a.txt", "Qwen/Qwen3-0.6B"])
    with pytest.raises(BadArgument, match="holds an input"):
        check_output(out, "train sft", [out])
    check_output(out, "train sft", [tmp_path, tmp_path / "minerals"])


def test_a_link_is_followed_and_the_current_folder_is_none_to_replace(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    RunFolder("bench", {}, {}, tmp_path / "link").finish()
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "run.json").is_file()
    monkeypatch.chdir(tmp_path / "disk")
    for place in (tmp_path / "disk", Path(), Path("../disk")):
        with pytest.raises(BadArgument, match="is where you are, and can't be replaced"):
            check_output(place, "bench")


def test_what_a_killed_process_left_is_no_output(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "expansions.jsonl").touch()
    (out / "expansions.jsonl.lock").touch()
    (out / f".run.json.{NOBODY}.partial").write_text("{")
    check_output(out, "teach")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadArgument, match="holds something other than `qe-edge teach` made"):
        check_output(out, "teach")


def test_what_a_live_process_moved_is_left_alone(tmp_path):
    put(tmp_path / f".out.{os.getpid()}.old", "old")
    put(tmp_path / f".out.{os.getpid()}.partial", "half")
    recover(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.iterdir())) == 2


def test_an_old_run_that_was_just_replaced_is_not_taken_for_an_interrupted_one(tmp_path):
    out = tmp_path / "001"
    RunFolder("bench", {"n": 1}, {}, out).finish()
    left = tmp_path / "001.partial"  # as a kill between exchange and clean-up leaves it
    left.mkdir()
    (left / "run.json").write_text((out / "run.json").read_text())
    put(left / "generated" / "x", "old")
    run = RunFolder("bench", {"n": 2}, {}, out)
    assert [path.name for path in run.partial.iterdir()] == ["run.json"]
    assert json.loads((run.partial / "run.json").read_text())["state"] == "running"


def test_what_is_replaced_is_told_and_what_is_none_of_ours_stays(tmp_path, capsys):
    out = tmp_path / "mine"
    RunFolder("bench", {}, {}, out).finish()
    assert capsys.readouterr().err == ""
    RunFolder("bench", {}, {}, out).finish()
    told = f"warning: {out} holds an earlier output of `qe-edge bench`, which this one replaces as a whole\n"
    assert capsys.readouterr().err == told
    put(tmp_path / "other.partial", "precious")
    with pytest.raises(BadArgument, match=r"other\.partial holds something other than a half-written output"):
        RunFolder("bench", {}, {}, tmp_path / "other")
    assert state(tmp_path / "other.partial") == {"a.txt": "precious", "b.txt": "precious"}


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_moment_a_whole_folder_is_there(tmp_path, way):
    out, chance = tmp_path / "out", random.Random(0)
    for _ in range(12):
        process = subprocess.Popen(
            [sys.executable, "-c", REPLACING, str(out), way], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if way == "by two renames":
            recover(out)
        assert is_whole(out)
    with atomic_path(out) as partial:
        put(partial, "last")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
